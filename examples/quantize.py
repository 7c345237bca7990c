"""Quantise a classifier to int8 with torchao, and see what it costs: size, speed and accuracy before and after.

    python examples/quantize.py --data reviews_en                               # a new classifier is trained first
    python examples/quantize.py --data reviews_en --model ./sentiment-output    # or one that is there already

Three ways: int8 weights; int8 weights with activations quantised as they come; and the latter after an epoch that
trains for it (QAT, Jacob et al. 2018). Each is saved in a folder of its own under --output, from where transformers
loads it with `from_pretrained`, torchao installed; ff.patch works on what it returns. The speeds printed are those of
PyTorch as it is, without torch.compile, which int8 needs to gain from.
"""

import argparse
import copy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import recipe
import torch
import transformers
from recipe_trainer import Clock, Trainer
from sentiment import accuracy
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_
from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

import fastformer as ff
from fastformer.demo.model import labels
from fastformer.demo.report import output_folder

BATCH = 32


def measure(model: Any, tokenizer: Any, examples: Sequence[dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    """Accuracy, and real tokens a second of wall and of CPU time, of a model over the examples."""
    if args.patch:
        ff.patch(model)
    collate, clock, right, tokens = recipe.collator(model.eval(), tokenizer, args.patch), Clock(), 0, 0
    batches = [collate(list(examples[i : i + BATCH])) for i in range(0, len(examples), BATCH)]
    with torch.inference_mode():
        model(**batches[0])  # what the first call sets up is not the model's speed
        clock.start()
        for batch in batches:
            batch = {k: v.to(model.device) if torch.is_tensor(v) else v for k, v in batch.items()}
            right += int((model(**batch).logits.argmax(-1) == batch["labels"]).sum())
            tokens += batch["input_ids"].numel() if "cu_seq_lens_q" in batch else int(batch["attention_mask"].sum())
        clock.stop()
    speeds = {"tokens_per_second": tokens / clock.seconds, "cpu_tokens_per_second": tokens / clock.cpu_seconds}
    return {"accuracy": right / len(examples), **speeds}


def quantized(folder: Path, config: Any, to: Path) -> Any:
    """The checkpoint in `folder` as transformers quantises it while loading; saved in `to`."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, quantization_config=transformers.TorchAoConfig(config), dtype=torch.float32
    )
    model.save_pretrained(to)
    return model


def train_for_int8(model: Any, tokenizer: Any, args: argparse.Namespace, parts: Sequence[Any], folder: Path) -> Trainer:
    """Train with activations and weights rounded to int8 in every linear layer, and save the float weights."""
    # torchao's rounding for training knows activations with a zero point only; int8 inference then does without.
    fake = {
        "activation_config": IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False),
        "weight_config": IntxFakeQuantizeConfig(torch.int8, "per_channel", is_symmetric=True),
    }
    quantize_(model, QATConfig(**fake, step="prepare"))
    apart = argparse.Namespace(**{**vars(args), "output": folder, "epochs": args.qat_epochs})
    apart.learning_rate = (args.learning_rate or 5e-4) / 2
    trainer = Trainer(model, tokenizer, apart, *parts, metrics=accuracy).fit()
    quantize_(model, QATConfig(step="convert"))
    trainer.finish("accuracy", trainer.evaluate()["eval_accuracy"])
    return trainer


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = recipe.arguments("quantize", __doc__)
    recipe.add_columns(parser)
    whole = recipe.whole_number(1, 10**6)
    parser.add_argument("--qat-epochs", type=whole, default=1, metavar="N", help="(default: 1)")
    args = parser.parse_args(argv)
    train, validation = recipe.read_classified(args)
    with output_folder(args.output):
        model, tokenizer = recipe.load(args, "SequenceClassification", train.texts, **labels(train.names))
        recipe.patch(model, args)
        parts = [recipe.encode(tokenizer, part, args.max_length) for part in (train, validation)]
        trainer = Trainer(model, tokenizer, args, *parts, metrics=accuracy)
        if not args.model:
            trainer.fit()
        model.save_pretrained(args.output)
        aware = args.output / "float32-for-int8"
        trainer.add_time_of(train_for_int8(copy.deepcopy(model), tokenizer, args, parts, aware))
        ways = {
            "int8 weights": (args.output, Int8WeightOnlyConfig()),
            "int8 dynamic": (args.output, Int8DynamicActivationInt8WeightConfig()),
            "int8 dynamic after QAT": (aware, Int8DynamicActivationInt8WeightConfig()),
        }
        table = {"float32": {**measure(model, tokenizer, parts[1], args), "bytes": weights_size(args.output)}}
        for name, (folder, config) in ways.items():
            to = args.output / name.replace(" ", "-")
            small = quantized(folder, config, to)
            table[name] = {**measure(small, tokenizer, parts[1], args), "bytes": weights_size(to)}
            tokenizer.save_pretrained(to)
        print(f"{'':<24}{'MB':>8}{'accuracy':>10}{'tokens/s':>12}{'by CPU time':>14}")
        for name, row in table.items():
            print(
                f"{name:<24}{row['bytes'] / 1e6:>8.2f}{row['accuracy']:>10.4f}{row['tokens_per_second']:>12,.0f}"
                f"{row['cpu_tokens_per_second']:>14,.0f}"
            )
        return trainer.finish("accuracy in int8", table["int8 dynamic after QAT"]["accuracy"], table=table)


def weights_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


if __name__ == "__main__":
    sys.exit(recipe.run(main))
