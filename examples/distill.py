"""Distil a classifier into a smaller one: the student learns the teacher's answers and its hidden states.

    python examples/distill.py --data reviews_en                             # a new teacher is trained first
    python examples/distill.py --data reviews_en --model ./sentiment-output  # or a classifier that is there already

The student is the teacher with every other layer left out (Sanh et al. 2019, DistilBERT). Its loss is the mean of
cross-entropy with the labels and T^2 KL(teacher || student) of the answers at temperature T (Hinton et al. 2015), plus
one minus the cosine between both models' hidden states, token by token, each of the student's layers beside
the one it was copied from.
"""

import argparse
import copy
import sys
from collections.abc import Sequence
from typing import Any

import recipe
import torch
import torch.nn.functional as F
from recipe_trainer import Trainer, real_tokens
from sentiment import accuracy
from torch import Tensor

from fastformer.demo.errors import UserError
from fastformer.demo.model import labels
from fastformer.demo.report import output_folder


def kept_layers(layers: int) -> list[int]:
    """Numbers of the teacher's layers that the student begins with: every second one, the last among them."""
    return list(range(layers - 1, -1, -2))[::-1]


def find_layers(teacher: Any) -> str:
    """The name of the list of the teacher's layers.

    Raises UserError where the teacher has one layer only, or keeps its layers where nobody finds them.
    """
    lists = [(name, m) for name, m in teacher.named_modules() if isinstance(m, torch.nn.ModuleList)]
    count = teacher.config.num_hidden_layers
    found = [name for name, layers in lists if len(layers) == count]
    if count < 2 or len(found) != 1:
        raise UserError(f"a teacher of two layers or more in one list is needed, got {count} layers, lists {found}")
    return found[0]


def make_student(teacher: Any) -> Any:
    """A model of the teacher's class with half its layers (rounded up), and the teacher's weights in all it has."""
    student, path = copy.deepcopy(teacher), find_layers(teacher)
    layers = student.get_submodule(path)
    kept = torch.nn.ModuleList([layers[i] for i in kept_layers(len(layers))])
    parent, _, name = path.rpartition(".")
    setattr(student.get_submodule(parent), name, kept)
    student.config.num_hidden_layers = len(kept)
    return student


class Distiller(Trainer):
    """A Trainer whose loss has a teacher."""

    def learn_from(self, teacher: Any, args: argparse.Namespace) -> "Distiller":
        self.teacher = teacher.eval().requires_grad_(False).to(self.args.device)
        self.temperature, self.share, self.hidden_weight = args.temperature, args.teacher_share, args.hidden_weight
        return self

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any) -> Any:
        out = model(**inputs, output_hidden_states=True)
        loss = out.loss
        if model.training:
            with torch.no_grad():
                told = self.teacher(**inputs, output_hidden_states=True)
            loss = (1 - self.share) * loss + self.share * soft_loss(out.logits, told.logits, self.temperature)
            real = real_tokens(inputs)
            pairs = zip(out.hidden_states[1:], [told.hidden_states[i + 1] for i in self.beside(told)], strict=True)
            loss = loss + self.hidden_weight * sum(hidden_loss(ours, theirs, real) for ours, theirs in pairs)
        return (loss, {"loss": loss, "logits": out.logits}) if return_outputs else loss

    @staticmethod
    def beside(told: Any) -> list[int]:
        return kept_layers(len(told.hidden_states) - 1)


def soft_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) of logits [batch, classes], the mean over the batch."""
    ours, theirs = (F.log_softmax(logits.float() / temperature, -1) for logits in (student, teacher))
    return temperature**2 * F.kl_div(ours, theirs, log_target=True, reduction="batchmean")


def hidden_loss(student: Tensor, teacher: Tensor, real: Tensor) -> Tensor:
    """One minus the cosine of hidden states [batch, tokens, width], the mean over the real tokens [batch, tokens]."""
    cosine = F.cosine_similarity(student.float(), teacher.float(), dim=-1)
    return 1 - (cosine * real).sum() / real.sum()


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = recipe.arguments("distill", __doc__, layers=4)
    recipe.add_columns(parser)
    parser.add_argument("--temperature", type=float, default=2.0, metavar="T", help="(default: 2)")
    parser.add_argument("--teacher-share", type=float, default=0.5, metavar="X", help="of the KL (default: 0.5)")
    parser.add_argument("--hidden-weight", type=float, default=1.0, metavar="X", help="of the cosines (default: 1)")
    args = parser.parse_args(argv)
    if args.temperature <= 0 or not 0 <= args.teacher_share <= 1:
        raise UserError("--temperature must be positive and --teacher-share between 0 and 1")
    train, validation = recipe.read_classified(args)
    apart = argparse.Namespace(**{**vars(args), "output": args.output / "teacher"})
    if args.resume and (apart.output / "config.json").is_file():
        args.model = str(apart.output)
    with output_folder(args.output):
        teacher, tokenizer = recipe.load(args, "SequenceClassification", train.texts, **labels(train.names))
        find_layers(teacher)  # before anything is trained
        recipe.patch(teacher, args)
        parts = [recipe.encode(tokenizer, part, args.max_length) for part in (train, validation)]
        if args.model:
            before = Trainer(teacher, tokenizer, args, *parts, metrics=accuracy).evaluate()["eval_accuracy"]
        else:
            print("The teacher:")
            trainer = Trainer(teacher, tokenizer, apart, *parts, metrics=accuracy).fit()
            before = trainer.evaluate()["eval_accuracy"]
            trainer.finish("teacher accuracy", before)
        student = make_student(teacher)
        print(f"The student, {student.config.num_hidden_layers} layers of {teacher.config.num_hidden_layers}:")
        distiller = Distiller(student, tokenizer, args, *parts, metrics=accuracy).learn_from(teacher, args).fit()
        after = distiller.evaluate()["eval_accuracy"]
        sizes = [sum(p.numel() for p in m.parameters()) for m in (teacher, student)]
        print(f"accuracy {before:.4f} with {sizes[0]:,} parameters, {after:.4f} with {sizes[1]:,}")
        return distiller.finish("student accuracy", after, teacher_accuracy=before, parameters=sizes)


if __name__ == "__main__":
    sys.exit(recipe.run(main))
