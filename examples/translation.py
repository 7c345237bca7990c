"""Train an English-to-German Transformer from nothing, translate with it, report BLEU.

    python examples/translation.py --data FOLDER             # train.en, train.de, val.en, val.de in it, or each as .gz
    python examples/translation.py --data FOLDER --no-patch  # the same with stock torch.nn, for comparison

The tokenizer is learned from the training text. The model is a plain torch.nn.Transformer; one line, ff.patch, takes
the padding out of both halves and lets the decoder keep its keys and values between steps. Weights, tokenizer,
translations and result.json go to --output.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import recipe
import sacrebleu
import torch
import torch.nn.functional as F
from recipe_trainer import LOG_EVERY, Clock, LossWatch, finish
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import fastformer as ff
from fastformer.cli import Parser, learning_rate, whole_number
from fastformer.demo.data import read_text
from fastformer.demo.errors import UserError
from fastformer.demo.memory import default_device
from fastformer.demo.report import atomically, output_folder

PAD, START, END = "<pad>", "<s>", "</s>"
LONGEST = 256  # tokens a side; the rest of a longer one is cut off
causal_mask = torch.nn.Transformer.generate_square_subsequent_mask


class Translator(torch.nn.Module):
    def __init__(self, vocab_size: int, size: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(vocab_size, size)
        self.positions = torch.nn.Embedding(LONGEST, size)
        self.dropout = torch.nn.Dropout(dropout)
        shape = (size, size // 64, layers, layers, 4 * size, dropout, "gelu")
        self.transformer = torch.nn.Transformer(*shape, batch_first=True, norm_first=True)
        for table in (self.embedding, self.positions):
            torch.nn.init.normal_(table.weight, std=size**-0.5)

    def embed(self, ids: torch.Tensor, first: int = 0) -> torch.Tensor:
        places = torch.arange(first, first + ids.shape[1], device=ids.device)
        return self.dropout(self.embedding(ids) * math.sqrt(self.embedding.embedding_dim) + self.positions(places))

    def loss(self, source: torch.Tensor, target: torch.Tensor, pad: int) -> torch.Tensor:
        """ids [batch, source length] and [batch, target length] to the mean loss of a real target token."""
        before, after = target[:, :-1], target[:, 1:]
        mask, padding = causal_mask(before.shape[1], device=target.device), source == pad
        paddings = {"src_key_padding_mask": padding, "memory_key_padding_mask": padding}
        paddings["tgt_key_padding_mask"] = before == pad
        source, before = self.embed(source), self.embed(before)
        hidden = self.transformer(source, before, tgt_mask=mask, tgt_is_causal=True, **paddings)
        real = after != pad
        return F.cross_entropy(F.linear(hidden[real], self.embedding.weight), after[real], label_smoothing=0.1)

    def next_scores(self, target, memory, padding, cache):  # type: ignore[no-untyped-def]
        """Log-probabilities [rows, vocab] of what follows target [rows, so far]; a cache knows all but its end."""
        if cache is None:
            mask = causal_mask(target.shape[1], device=target.device)
            hidden = self.transformer.decoder(self.embed(target), memory, mask, memory_key_padding_mask=padding)
        else:
            new = self.embed(target[:, len(cache) :], len(cache))
            hidden = self.transformer.decoder(new, memory, memory_key_padding_mask=padding, cache=cache)
        return F.linear(hidden[:, -1], self.embedding.weight).log_softmax(-1)

    @torch.no_grad()
    def translate(self, source: torch.Tensor, tok: ff.BPETokenizer, beams: int, longest: int = 60) -> list[str]:
        """Beam search by mean log-probability of a token; greedy with one beam."""
        pad, start, end = (tok.token_to_id(t) for t in (PAD, START, END))
        padding = source == pad
        memory = self.transformer.encoder(self.embed(source), src_key_padding_mask=padding)
        memory, padding = memory.repeat_interleave(beams, 0), padding.repeat_interleave(beams, 0)
        cache = ff.nn.KVCache() if isinstance(self.transformer.decoder, ff.nn.TransformerDecoder) else None
        rows = torch.arange(len(memory), device=source.device)
        target, length, done = torch.full_like(rows[:, None], start), torch.ones_like(rows), rows < 0
        # Beams of a sentence start alike: all but the first wait.
        total = torch.where(rows % beams == 0, 0.0, -math.inf)
        for _ in range(longest):
            scores = self.next_scores(target, memory, padding, cache)
            # An ended sentence goes on with padding, for nothing.
            scores[done] = torch.where(torch.arange(len(tok), device=source.device) == pad, 0.0, -math.inf)
            scores, length = total[:, None] + scores, length + ~done
            best = (scores / length[:, None]).view(len(source), -1).topk(beams).indices
            kept = (rows[::beams, None] + best // len(tok)).flatten()
            token = (best % len(tok)).flatten()
            total, length, done = scores[kept, token], length[kept], done[kept] | (token == end)
            target = torch.cat((target[kept], token[:, None]), 1)
            if cache is not None and beams > 1:
                cache.reorder(kept, same_memory=True)
            if done.all():
                break
        return tok.decode_batch([[i for i in row if i not in (pad, start, end)] for row in target[::beams].tolist()])


def read(folder: Path, name: str) -> tuple[list[str], list[str]]:
    """The English and the German lines. Raises UserError for a missing file, or sides of unequal length."""
    paths = [path if (path := folder / f"{name}.{side}").exists() else Path(f"{path}.gz") for side in ("en", "de")]
    # Not splitlines, which also breaks at characters that text files have within lines.
    sides = [read_text(path).replace("\r\n", "\n").removesuffix("\n").split("\n") for path in paths]
    counts = [len(lines) for lines in sides]
    if counts[0] != counts[1]:
        raise UserError(f"{paths[0]} has {counts[0]:,} lines and {paths[1]} {counts[1]:,}; a pair needs one of each")
    return sides[0], sides[1]


def encode(tok: ff.BPETokenizer, texts: list[str]) -> list[torch.Tensor]:
    start, end, most = tok.token_to_id(START), tok.token_to_id(END), LONGEST - 2
    return [torch.tensor([start, *ids[:most], end]) for ids in tok.encode_batch(texts)]


def train(model: Translator, pairs: list, args: argparse.Namespace, pad: int) -> tuple[int, Clock, LossWatch]:
    """How many tokens were trained on, in what time, with which losses. Raises Diverged where they are no numbers."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.98), fused=True)
    warmup, device = max(1, min(400, args.steps // 5)), next(model.parameters()).device
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min((n + 1) / warmup, 1 - n / args.steps))
    tokens, clock, watch = 0, Clock(), LossWatch()
    batches = torch.cat([torch.randperm(len(pairs)) for _ in range(args.steps * args.batch_size // len(pairs) + 1)])
    bar = tqdm(batches.split(args.batch_size)[: args.steps], unit="step", mininterval=1)
    clock.start()
    for step, chosen in enumerate(bar, 1):
        sides = list(zip(*(pairs[i] for i in chosen.tolist()), strict=True))
        tokens += sum(len(ids) for side in sides for ids in side)
        loss = model.loss(*(pad_sequence(side, True, pad).to(device) for side in sides), pad)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        watch.see(loss)
        if step % LOG_EVERY == 0 or step == args.steps:
            watch.check(model)
            bar.set_postfix(loss=f"{watch.losses[-1]:.3f}")
    clock.stop()
    return tokens, clock, watch


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, whole = parser.add_argument, whole_number(1, 2**31)
    add("--data", type=Path, required=True, metavar="FOLDER", help="with train and val in .en and .de (or .gz)")
    add("--output", type=Path, default=Path("translation-output"), metavar="FOLDER")
    add("--patch", action=argparse.BooleanOptionalAction, default=True, help="fastformer or stock, to compare")
    add("--beams", type=whole, nargs="*", default=[1, 4], metavar="N", help="(default: 1, which is greedy, and 4)")
    add("--learning-rate", type=learning_rate, default=1e-3, metavar="X", help="(default: 1e-3)")
    add("--dropout", type=float, default=0.1, metavar="P", help="(default: 0.1)")
    numbers = {"steps": 3000, "batch_size": 64, "vocab_size": 6000, "width": 256, "layers": 3}
    for name, default in numbers.items():
        add(f"--{name.replace('_', '-')}", type=whole, default=default, metavar="N", help=f"(default: {default})")
    parser.set_defaults(recipe="translation")
    args = parser.parse_args(argv)
    if args.width % 64 or not 0 <= args.dropout < 1:
        raise UserError(f"--width must be a multiple of 64 and 0 <= --dropout < 1, got {args.width}, {args.dropout}")

    english, german = read(args.data, "train")
    sources, references = read(args.data, "val")
    with output_folder(args.output):
        try:
            tok = ff.BPETokenizer.train(english + german, args.vocab_size, special_tokens=[PAD, START, END])
        except ValueError as error:
            raise UserError(str(error)) from None
        pad = tok.token_to_id(PAD)
        torch.manual_seed(0)
        device = default_device()
        model = Translator(len(tok), args.width, args.layers, args.dropout).to(device)
        recipe.patch(model, args)
        pairs = list(zip(encode(tok, english), encode(tok, german), strict=True))
        tokens, clock, watch = train(model, pairs, args, pad)
        atomically(args.output / "model.pt", lambda path: torch.save(model.state_dict(), path))
        tok.save(args.output)

        model, bleu = model.eval(), {}
        ids = encode(tok, sources)
        parts = [pad_sequence(ids[i : i + 50], True, pad).to(device) for i in range(0, len(ids), 50)]
        for beams in args.beams:
            found = [text for part in tqdm(parts, leave=False) for text in model.translate(part, tok, beams)]
            (args.output / f"beams-{beams}.de").write_text("".join(f"{line}\n" for line in found), encoding="utf-8")
            score = sacrebleu.corpus_bleu(found, [references])
            bleu[beams] = score.score
            print("\n".join(f"  {a} → {b}" for a, b in zip(sources[:3], found, strict=False)))
            print(f"{beams} beams: {score}")
        metric, value = ("BLEU", max(bleu.values())) if bleu else ("loss", watch.losses[-1])
        return finish(args, metric, value, tokens, clock, watch.losses, bleu=bleu)


if __name__ == "__main__":
    sys.exit(recipe.run(main))
