"""Fine-tune a classifier that bears noise: augmented text, adversarial embeddings, R-Drop, early stopping.

    python examples/robust.py --data reviews_zh
    python examples/robust.py --data reviews_zh --noise 0 --fgm 0 --r-drop 0    # without, to compare

- Noise: every time a text is seen, a share of its characters is dropped, doubled, swapped with the next or exchanged
  for another of the training text. A byte-level tokenizer then cuts the text elsewhere, as with typing errors.
- FGM (Miyato et al. 2017): a second pass with the word embeddings moved along their gradient by epsilon times the mean
  norm of one, whose gradients add to the first's.
- R-Drop (Wu et al. 2021): two passes with other dropout, and alpha times the symmetric KL of their answers on the loss.
"""

import random
import sys
from collections.abc import Sequence
from typing import Any

import recipe
import torch
import torch.nn.functional as F
import transformers
from recipe_trainer import Trainer
from sentiment import accuracy
from torch import Tensor

from fastformer.demo.data import Corpus
from fastformer.demo.errors import UserError
from fastformer.demo.model import labels
from fastformer.demo.report import output_folder


def add_noise(text: str, rate: float, alphabet: str, draw: random.Random) -> str:
    """The text with a share of `rate` of its characters dropped, doubled, swapped with the next or exchanged."""
    out: list[str] = []
    characters = iter(text)
    for character in characters:
        if draw.random() >= rate:
            out.append(character)
            continue
        match draw.randrange(4):
            case 0:
                pass
            case 1:
                out += (character, character)
            case 2:
                out += (next(characters, ""), character)
            case _:
                out.append(draw.choice(alphabet))
    return "".join(out) or text


class NoisyTexts(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows of a corpus, tokenised and with new noise each time they are drawn."""

    def __init__(self, corpus: Corpus, tokenizer: Any, max_length: int, rate: float, seed: int) -> None:
        self._corpus, self._tokenizer, self._max_length, self._rate = corpus, tokenizer, max_length, rate
        self._draw = random.Random(seed)
        self._alphabet = "".join(sorted(set("".join(corpus.texts))))

    def __len__(self) -> int:
        return len(self._corpus.texts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        text = add_noise(self._corpus.texts[index], self._rate, self._alphabet, self._draw)
        ids = self._tokenizer(text, truncation=True, max_length=self._max_length)["input_ids"]
        return {"input_ids": ids, "labels": self._corpus.labels[index]}


class RobustTrainer(Trainer):
    """A Trainer with FGM and R-Drop, each where its weight is not 0."""

    epsilon = alpha = 0.0

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(model, inputs, *args, **kwargs)
        weight = self.accelerator.unwrap_model(model).get_input_embeddings().weight
        if self.epsilon and weight.grad is not None:
            before = weight.detach().clone()
            with torch.no_grad():
                # In units of a token's norm: a step that turns BERT's embeddings buries those of a new model.
                length = self.epsilon * weight.norm(dim=1).mean()
                weight.add_(length * weight.grad / weight.grad.norm().clamp_min(1e-12))
            transformers.Trainer.training_step(self, model, inputs, *args, **kwargs)
            with torch.no_grad():
                weight.copy_(before)
        return loss

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any) -> Any:
        out = model(**inputs)
        loss = out.loss
        if self.alpha and model.training:
            again = model(**inputs)
            loss = (loss + again.loss) / 2 + self.alpha * symmetric_kl(out.logits, again.logits)
        return (loss, {"loss": loss, "logits": out.logits}) if return_outputs else loss


def symmetric_kl(first: Tensor, second: Tensor) -> Tensor:
    """Mean of KL(p || q) and KL(q || p) of logits [batch, classes], the mean over the batch."""
    p, q = (F.log_softmax(logits.float(), -1) for logits in (first, second))
    both = [F.kl_div(a, b, log_target=True, reduction="batchmean") for a, b in ((p, q), (q, p))]
    return (both[0] + both[1]) / 2


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = recipe.arguments("robust", __doc__, without=("save_every",), epochs=5)
    recipe.add_columns(parser)
    parser.add_argument("--noise", type=float, default=0.05, metavar="X", help="share of characters (default: 0.05)")
    parser.add_argument("--fgm", type=float, default=0.5, metavar="X", help="of an embedding's norm (default: 0.5)")
    parser.add_argument("--r-drop", type=float, default=0.5, metavar="X", help="alpha (default: 0.5)")
    whole = recipe.whole_number(1, 10**6)
    parser.add_argument("--patience", type=whole, default=2, metavar="N", help="epochs without gain (default: 2)")
    args = parser.parse_args(argv)
    if not 0 <= args.noise < 1 or args.fgm < 0 or args.r_drop < 0:
        raise UserError("--noise must be at least 0 and below 1, --fgm and --r-drop must not be negative")
    train, validation = recipe.read_classified(args)
    with output_folder(args.output):
        model, tokenizer = recipe.load(args, "SequenceClassification", train.texts, **labels(train.names))
        recipe.patch(model, args)
        clean = recipe.encode(tokenizer, validation, args.max_length)
        noisy = NoisyTexts(validation, tokenizer, args.max_length, args.noise or 0.05, args.seed + 1)
        trainer = RobustTrainer(
            model,
            tokenizer,
            args,
            NoisyTexts(train, tokenizer, args.max_length, args.noise, args.seed),
            clean,
            metrics=accuracy,
            callbacks=[transformers.EarlyStoppingCallback(args.patience)],
            load_best_model_at_end=True,
            metric_for_best_model="accuracy",
        )
        trainer.epsilon, trainer.alpha = args.fgm, args.r_drop
        trainer.fit()
        scores = [trainer.evaluate(part)["eval_accuracy"] for part in (clean, [noisy[i] for i in range(len(noisy))])]
        print(f"accuracy {scores[0]:.4f}, {scores[1]:.4f} on text with noise")
        return trainer.finish("accuracy with noise", scores[1], clean_accuracy=scores[0])


if __name__ == "__main__":
    sys.exit(recipe.run(main))
