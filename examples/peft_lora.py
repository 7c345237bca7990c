"""Fine-tune few parameters of a classifier with peft: LoRA, AdaLoRA, a prefix; or with no library, its last layers.

    python examples/peft_lora.py --data reviews_en --model ./pretrain-output
    python examples/peft_lora.py --data reviews_en --model ./pretrain-output --method adalora

LoRA (Hu et al. 2021) and AdaLoRA (Zhang et al. 2023) are merged into the model at the end: what is saved is an ordinary
checkpoint, and its answers are compared with the adapted model's. The adapter alone stands beside it in adapter/. A
prefix (Li and Liang 2021) cannot be merged; its keys come from outside the batch, so it runs on padded batches through
stock attention. Without --model the frozen weights are random, and little can be learned.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from typing import Any

import peft
import recipe
import torch
import transformers
from recipe_trainer import Trainer
from sentiment import accuracy

from fastformer.demo.errors import UserError
from fastformer.demo.model import labels
from fastformer.demo.report import output_folder

METHODS = ("lora", "adalora", "prefix", "freeze")


def adapt(model: Any, args: argparse.Namespace, steps: int) -> Any:
    """The model with few trainable parameters. steps: of the whole training, which AdaLoRA's schedule needs."""
    task = {"task_type": "SEQ_CLS"}
    lora = {"target_modules": "all-linear", "lora_alpha": 2 * args.rank, "lora_dropout": args.dropout, **task}
    if args.method == "lora":
        return peft.get_peft_model(model, peft.LoraConfig(r=args.rank, **lora))
    if args.method == "adalora":
        ranks = {"init_r": args.rank + args.rank // 2, "target_r": args.rank}
        schedule = {"tinit": steps // 10, "tfinal": steps // 5, "deltaT": 10, "total_step": steps}
        return peft.get_peft_model(model, peft.AdaLoraConfig(**ranks, **schedule, **lora))
    if args.method == "prefix":
        return peft.get_peft_model(model, peft.PrefixTuningConfig(num_virtual_tokens=args.rank, **task))
    return freeze(model, args.trainable_layers)


def freeze(model: Any, trainable_layers: int) -> Any:
    """The same model, of whose body only the last layers learn; the head always does.

    Raises UserError where the model keeps its layers where nobody finds them, or has no more than are to learn.
    """
    count = model.config.num_hidden_layers
    found = [m for m in model.base_model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count]
    if len(found) != 1 or trainable_layers >= count:
        raise UserError(f"--trainable-layers {trainable_layers} needs a model of more layers in one list, got {count}")
    model.base_model.requires_grad_(False)
    for layer in found[0][count - trainable_layers :]:
        layer.requires_grad_(True)
    return model


class AllocateRanks(transformers.TrainerCallback):
    """AdaLoRA shares out its ranks between the layers by the gradients of each step."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.base_model.update_and_allocate(state.global_step)


@torch.no_grad()
def answers(trainer: Trainer, examples: Sequence[dict[str, Any]]) -> Any:
    """Logits [examples, classes] of a few examples, for comparing."""
    return trainer.predict(list(examples[:64])).predictions


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = recipe.arguments("peft_lora", __doc__)
    recipe.add_columns(parser)
    parser.add_argument("--method", choices=METHODS, default="lora", help="(default: lora)")
    whole = recipe.whole_number(1, 10**6)
    parser.add_argument("--rank", type=whole, default=8, metavar="N", help="or length of the prefix (default: 8)")
    parser.add_argument("--trainable-layers", type=whole, default=1, metavar="N", help="of freeze (default: 1)")
    args = parser.parse_args(argv)
    args.learning_rate = args.learning_rate or 1e-3  # few parameters take larger steps
    train, validation = recipe.read_classified(args)
    with output_folder(args.output):
        model, tokenizer = recipe.load(args, "SequenceClassification", train.texts, **labels(train.names))
        recipe.patch(model, args)
        parts = [recipe.encode(tokenizer, part, args.max_length) for part in (train, validation)]
        adapted = adapt(model, args, args.epochs * math.ceil(len(parts[0]) / args.batch_size))
        learns = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        print(f"{learns:,} of {sum(p.numel() for p in adapted.parameters()):,} parameters learn")
        extras: dict[str, Any] = {"callbacks": [AllocateRanks()]} if args.method == "adalora" else {}
        if args.method == "prefix":
            extras["packs"] = False
        trainer = Trainer(adapted, tokenizer, args, *parts, metrics=accuracy, **extras).fit()
        score = trainer.evaluate()["eval_accuracy"]
        more: dict[str, Any] = {"method": args.method, "trainable": learns}
        plain = model
        if args.method == "prefix":
            plain, _ = recipe.load(args, "SequenceClassification", train.texts, **labels(train.names))
        if args.method != "freeze":
            adapted.save_pretrained(args.output / "adapter")
        if args.method in ("lora", "adalora"):
            before = answers(trainer, parts[1])
            plain = trainer.model = adapted.merge_and_unload()
            difference = more["merged_difference"] = float(abs(answers(trainer, parts[1]) - before).max())
            print(f"The merged model's logits differ from the adapted one's by {difference:.1e} at most.")
        return trainer.finish("accuracy", score, plain, **more)


if __name__ == "__main__":
    sys.exit(recipe.run(main))
