"""Fine-tune a tagger of entities: CoNLL files, one word a line with its label (B-x, I-x, O) last, sentences apart.

    python examples/ner.py --data wnut17                     # train.conll and validation.conll (or .conll.gz)
    python examples/ner.py --data wnut17 --no-patch          # the same with stock transformers

A sentence is its words joined with spaces; a word's label stands at the first of its tokens that is no token of the
word before it, whatever characters a byte-level token begins or ends in.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import recipe
from recipe_trainer import Trainer
from seqeval.metrics import classification_report, f1_score

from fastformer.demo.data import check_labels, read_text
from fastformer.demo.errors import UserError
from fastformer.demo.model import labels
from fastformer.demo.report import output_folder

IGNORED = -100  # of cross_entropy


class Sentence(NamedTuple):
    words: list[str]
    tags: list[str]


def read_conll(path: Path) -> list[Sentence]:
    """Sentences of a CoNLL file. Raises UserError, naming the line, for anything else."""
    found: list[Sentence] = []
    current = Sentence([], [])
    for number, line in enumerate([*read_text(path).split("\n"), ""], 1):
        if not line.strip():
            if current.words:
                found.append(current)
            current = Sentence([], [])
            continue
        columns = line.strip().split("\t") if "\t" in line.strip() else line.split()
        word, tag = columns[0].strip(), columns[-1].strip()
        if len(columns) < 2 or not word:
            raise UserError(f"{path}, line {number}: a word and its label are needed, got {line.strip()!r}")
        if tag != "O" and not (tag[:2] in ("B-", "I-") and tag[2:]):
            raise UserError(f"{path}, line {number}: the label {tag!r} is none of O, B-x and I-x")
        if word != "-DOCSTART-":
            current.words.append(word)
            current.tags.append(tag)
    if not found:
        raise UserError(f"{path} holds no sentences")
    return found


def first_tokens(words: Sequence[str], offsets: Sequence[tuple[int, int]]) -> list[int | None]:
    """For each word of " ".join(words) the number of its first token, None for one that was cut off.

    offsets: characters of each token; (0, 0) for special tokens.
    """
    places: list[int | None] = []
    token, start = 0, 0
    for word in words:
        end = start + len(word)
        while token < len(offsets) and offsets[token][1] <= start:
            token += 1
        begins = token < len(offsets) and offsets[token][0] < end and offsets[token][1] > start
        places.append(token if begins else None)
        token += begins
        start = end + 1
    return places


def encode(
    tokenizer: Any, sentences: Sequence[Sentence], names: Sequence[str], max_length: int
) -> tuple[list[dict[str, Any]], list[list[int | None]]]:
    """The sentences as a data set (input_ids, and labels at the first tokens of words), and where their words are."""
    rows, places = [], []
    for words, tags in sentences:
        row = tokenizer(" ".join(words), truncation=True, max_length=max_length, return_offsets_mapping=True)
        label = [IGNORED] * len(row["input_ids"])
        places.append(first_tokens(words, row["offset_mapping"]))
        for place, tag in zip(places[-1], tags, strict=True):
            if place is not None:
                label[place] = names.index(tag)
        rows.append({"input_ids": row["input_ids"], "labels": label})
    return rows, places


def predicted_tags(logits: Any, names: Sequence[str], places: Sequence[Sequence[int | None]]) -> list[list[str]]:
    """The tag of every word; a word without a token of its own, as one that was cut off, is taken for O."""
    return [
        ["O" if place is None else names[row[place].argmax()] for place in words]
        for row, words in zip(logits, places, strict=True)
    ]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = recipe.arguments("ner", __doc__, epochs=6, max_length=128).parse_args(argv)
    files = recipe.find_files(args.data, (".conll",))
    if len(files) == 1:
        raise UserError(f"--data needs a folder with train.conll and validation.conll, got {args.data}")
    train, validation = (read_conll(path)[: args.rows] for path in files)
    names = sorted({tag for sentence in train for tag in sentence.tags}, key=lambda tag: (tag != "O", tag[2:], tag))
    check_labels(files[1], (tag for sentence in validation for tag in sentence.tags), names)
    print(f"sentences  {len(train):,} to learn from, {len(validation):,} to validate; labels {', '.join(names)}")
    with output_folder(args.output):
        texts = [" ".join(sentence.words) for sentence in train]
        model, tokenizer = recipe.load(args, "TokenClassification", texts, **labels(names))
        recipe.patch(model, args)
        learned, _ = encode(tokenizer, train, names, args.max_length)
        held_out, places = encode(tokenizer, validation, names, args.max_length)
        tags = [sentence.tags for sentence in validation]

        def entity_f1(answer: Any) -> dict[str, float]:
            return {"f1": f1_score(tags, predicted_tags(answer.predictions, names, places), zero_division=0)}

        trainer = Trainer(model, tokenizer, args, learned, held_out, metrics=entity_f1, per_token=True).fit()
        answer = trainer.predict(held_out)
        found = predicted_tags(answer.predictions, names, places)
        print(classification_report(tags, found, digits=3, zero_division=0))
        return trainer.finish("entity F1", answer.metrics["test_f1"])


if __name__ == "__main__":
    sys.exit(recipe.run(main))
