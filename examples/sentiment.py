"""Fine-tune a text classifier: reviews in English, Chinese or any language, a label a row.

python examples/sentiment.py --data reviews_en                       # train.csv and validation.csv (or .csv.gz)
python examples/sentiment.py --data reviews_zh --no-patch            # the same with stock transformers
python examples/sentiment.py --data my.csv --text-column body --label-column stars --model ./my-bert
"""

import sys
from collections.abc import Sequence
from typing import Any

import recipe
from recipe_trainer import Trainer
from sklearn.metrics import classification_report

from fastformer.demo.model import labels
from fastformer.demo.report import output_folder


def accuracy(predicted: Any) -> dict[str, float]:
    return {"accuracy": float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = recipe.arguments("sentiment", __doc__)
    recipe.add_columns(parser)
    args = parser.parse_args(argv)
    train, validation = recipe.read_classified(args)
    with output_folder(args.output):
        model, tokenizer = recipe.load(args, "SequenceClassification", train.texts, **labels(train.names))
        recipe.patch(model, args)
        parts = [recipe.encode(tokenizer, part, args.max_length) for part in (train, validation)]
        trainer = Trainer(model, tokenizer, args, *parts, metrics=accuracy).fit()
        answer = trainer.predict(parts[1])
        classes = list(range(len(train.names)))
        print(
            classification_report(
                answer.label_ids,
                answer.predictions.argmax(-1),
                labels=classes,
                target_names=train.names,
                digits=3,
                zero_division=0,
            )
        )
        return trainer.finish("accuracy", answer.metrics["test_accuracy"])


if __name__ == "__main__":
    sys.exit(recipe.run(main))
