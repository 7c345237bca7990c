"""Train an English-to-German Transformer from nothing, translate with it, report BLEU.

    python examples/translation.py --data FOLDER             # train.en, train.de, val.en, val.de in it, or each as .gz
    python examples/translation.py --data FOLDER --no-patch  # the same with stock torch.nn, for comparison

The tokenizer is learned from the training text. The model is a plain torch.nn.Transformer; one line, ff.patch, takes
the padding out of both halves and lets the decoder keep its keys and values between steps.
"""

import argparse
import gzip
import math
from pathlib import Path

import sacrebleu
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

import fastformer as ff

PAD, START, END = "<pad>", "<s>", "</s>"
causal_mask = torch.nn.Transformer.generate_square_subsequent_mask


class Translator(torch.nn.Module):
    def __init__(self, vocab_size: int, size: int, layers: int, dropout: float, longest: int = 256) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(vocab_size, size)
        self.positions = torch.nn.Embedding(longest, size)
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


def read(path: Path) -> list[str]:
    data = path.read_bytes() if path.exists() else gzip.decompress(path.with_name(f"{path.name}.gz").read_bytes())
    return data.decode().splitlines()


def encode(tok: ff.BPETokenizer, texts: list[str]) -> list[torch.Tensor]:
    start, end = tok.token_to_id(START), tok.token_to_id(END)
    return [torch.tensor([start, *ids, end]) for ids in tok.encode_batch(texts)]


def train(model: Translator, pairs: list, options: argparse.Namespace, device: torch.device) -> list[float]:
    """Losses of the steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.98))
    warmup, steps = max(1, min(400, options.steps // 5)), options.steps
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min((n + 1) / warmup, 1 - n / steps))
    losses: list[float] = []
    batches = torch.cat([torch.randperm(len(pairs)) for _ in range(steps * options.batch // len(pairs) + 1)])
    for step, chosen in enumerate(batches.split(options.batch)[:steps], 1):
        sides = zip(*(pairs[i] for i in chosen.tolist()), strict=True)
        loss = model.loss(*(pad_sequence(side, True, options.pad).to(device) for side in sides), options.pad)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        losses.append(loss.item())
        if step % 100 == 0 or step == steps:
            print(f"step {step:>5}  loss {losses[-1]:.4f}", flush=True)
    return losses


def main(arguments: list[str] | None = None) -> tuple[list[float], list[list[str]]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train and val in .en and .de (or .gz)")
    parser.add_argument("--patch", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--beams", type=int, nargs="*", default=[1, 4], help="default 1 (greedy) and 4")
    numbers = {"steps": 3000, "batch": 64, "vocab": 6000, "size": 256, "layers": 3}
    for name, default in {**numbers, "dropout": 0.1, "lr": 1e-3}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"default {default}")
    options = parser.parse_args(arguments)

    english, german = (read(options.data / f"train.{side}") for side in ("en", "de"))
    tok = ff.BPETokenizer.train(english + german, options.vocab, special_tokens=[PAD, START, END])
    options.pad = tok.token_to_id(PAD)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = Translator(len(tok), options.size, options.layers, options.dropout).to(device)
    if options.patch:
        print(ff.patch(model))
    losses = train(model, list(zip(encode(tok, english), encode(tok, german), strict=True)), options, device)

    model, found = model.eval(), []
    sources, references = (read(options.data / f"val.{side}") for side in ("en", "de"))
    ids = encode(tok, sources)
    parts = [pad_sequence(ids[i : i + 50], True, options.pad).to(device) for i in range(0, len(ids), 50)]
    for beams in options.beams:
        found.append([text for part in parts for text in model.translate(part, tok, beams)])
        print("\n".join(f"  {a} → {b}" for a, b in zip(sources[:3], found[-1], strict=False)))
        print(f"{beams} beams: {sacrebleu.corpus_bleu(found[-1], [references])}")
    return losses, found


if __name__ == "__main__":
    main()
