"""What the recipes share: arguments and exit codes, data, a model and a tokenizer (a checkpoint's, or new ones)."""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

import fastformer as ff
from fastformer.cli import INTERRUPTED, Parser, hush_imports, learning_rate, whole_number
from fastformer.demo import model as models
from fastformer.demo.data import Corpus, read_corpus, split
from fastformer.demo.errors import UserError
from fastformer.integrations.transformers import FastTokenizer, PackedCollator

PAD, CLS, SEP, MASK = SPECIAL_TOKENS = ("[PAD]", "[CLS]", "[SEP]", "[MASK]")
hush_imports()  # before Trainer is imported
HELD_OUT = 0.15  # of a single file, where there is none for validation


# Arguments and exit codes


def arguments(name: str, doc: str | None, without: Sequence[str] = (), **defaults: Any) -> Parser:
    """The arguments of every recipe, to which it adds its own with add_argument.

    name: of the recipe and its output; without: numbers that it does not take; defaults: of those that it takes.
    """
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(recipe=name)
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="PATH", help="a file, or a folder with train.* and validation.*")
    add("--model", metavar="NAME_OR_PATH", help="a Hugging Face checkpoint (default: a small new model and tokenizer)")
    add("--patch", action=argparse.BooleanOptionalAction, default=True, help="fastformer or stock, to compare")
    add("--output", type=Path, default=Path(f"{name}-output"), metavar="FOLDER", help=f"(default: {name}-output/)")
    add("--resume", action="store_true", help="go on from the last checkpoint in --output, of an interrupted run")
    add("--learning-rate", type=learning_rate, metavar="X", help="(default: 5e-5 with --model, 5e-4 for a new one)")
    add("--dropout", type=float, default=0.1, metavar="P", help="of a new model (default: 0.1)")
    counts = {
        "epochs": (3, "passes over the data"),
        "batch_size": (16, "sequences a step"),
        "max_length": (256, "tokens a sequence, at most"),
        "rows": (None, "rows of each file to use (default: all)"),
        "save_every": (None, "steps between checkpoints (default: an epoch)"),
        "vocab_size": (4096, "ids of a new tokenizer"),
        "width": (128, "of a new model, a multiple of 64"),
        "layers": (2, "of a new model"),
        "seed": (0, "of weights, order and dropout"),
    }
    for key, (default, what) in counts.items():
        if key in without:
            parser.set_defaults(**{key: None})
            continue
        default = defaults.pop(key, default)
        kind = whole_number(8 if key == "max_length" else 0 if key == "seed" else 1, 2**31)
        shown = "" if default is None else f" (default: {default})"
        add(f"--{key.replace('_', '-')}", type=kind, default=default, metavar="N", help=what + shown)
    parser.set_defaults(**defaults)
    return parser


def add_columns(parser: Parser) -> None:
    """The names of a file's columns, for recipes that classify."""
    for what in ("text", "label"):
        parser.add_argument(f"--{what}-column", default=what, metavar="NAME", help=f"(default: {what})")


class Diverged(Exception):
    """Training ended because its loss or its weights are no finite numbers any more; the message says where."""


def run(recipe: Callable[[Sequence[str] | None], object]) -> int:
    """Run a recipe's main on sys.argv. Returns the exit code: 0, 1 (diverged), 2 (the user's to fix), 130 (Ctrl-C)."""
    codes = {UserError: 2, Diverged: 1, KeyboardInterrupt: INTERRUPTED}
    try:
        recipe(None)
    except tuple(codes) as error:
        message = "; ".join([str(error) or "interrupted", *getattr(error, "__notes__", ())])
        begin = "" if isinstance(error, UserError) else "\n"  # a progress bar stands where it was left
        print(f"{begin}{Path(sys.argv[0]).name}: {message}.", file=sys.stderr)
        return codes[type(error)]
    return 0


# Data


def read_classified(args: argparse.Namespace) -> tuple[Corpus, Corpus]:
    """Training and validation rows, as demo.data reads them: two files of a folder, or one file that is split."""
    columns = (args.text_column, args.label_column)
    files = find_files(args.data, (".csv", ".jsonl"))
    train = read_corpus(files[0], *columns)
    if len(files) == 1:
        train, validation = split(train, HELD_OUT, args.seed)
    else:
        validation = read_corpus(files[1], *columns, known=train.names)
    parts = tuple(part.take(list(range(len(part.texts))[: args.rows])) for part in (train, validation))
    for name, part in zip(("training", "validation"), parts, strict=True):
        print(f"{name:<11}{len(part.texts):,} rows of {part.source}{f'; {part.note}' if part.note else ''}")
    return parts[0], parts[1]


def find_files(path: Path, endings: Sequence[str]) -> list[Path]:
    """The file itself, or a folder's train.* and validation.* with one of the endings, .gz or not.

    Raises UserError where there is no such file.
    """
    if not path.is_dir():
        return [path]
    found = []
    for name in ("train", "validation"):
        names = [f"{name}{ending}{gz}" for ending in endings for gz in ("", ".gz")]
        here = [path / name for name in names if (path / name).is_file()]
        if not here:
            raise UserError(f"--data {path} holds none of {', '.join(names)}")
        found.append(here[0])
    return found


# Model and tokenizer


def load(args: argparse.Namespace, kind: str, texts: Iterable[str], **settings: Any) -> tuple[Any, FastTokenizer]:
    """The checkpoint of --model as transformers' AutoModelFor`kind`, or a small new BERT and a tokenizer of the texts.

    settings: fields of the configuration, as demo.model.labels(names). Raises UserError for what cannot be loaded.
    """
    quiet()
    if kind == "SequenceClassification":  # whatever the checkpoint's last task was
        settings["problem_type"] = "single_label_classification"
    torch.manual_seed(args.seed)
    if args.model:
        model = models.load_model(args.model, f"AutoModelFor{kind}", args.max_length, **settings)
        tokenizer = FastTokenizer.of(models.load_tokenizer(args.model, f"the tokenizer of --model {args.model}"))
        if tokenizer.pad_token is None and tokenizer.eos_token is None:
            raise UserError(f"the tokenizer of --model {args.model} has neither a padding nor an end token")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if model.config.pad_token_id is None:
            model.config.pad_token_id = tokenizer.pad_token_id
        return model, tokenizer
    tokenizer = new_tokenizer(texts, args.vocab_size, args.max_length)
    return new_model(args, kind, tokenizer, **settings), tokenizer


def new_model(args: argparse.Namespace, kind: str, tokenizer: Any, **settings: Any) -> Any:
    """A small model with random weights: a Llama for "CausalLM", a BERT for every other kind.

    Raises UserError for a width or a dropout that cannot be.
    """
    if args.width >= 64 and args.width % 64:
        raise UserError(f"--width must be a multiple of 64 or less than 64, got {args.width}")
    if not 0 <= args.dropout < 1:
        raise UserError(f"--dropout must be at least 0 and below 1, got {args.dropout}")
    torch.manual_seed(args.seed)
    rates = {"hidden_dropout_prob": args.dropout, "attention_probs_dropout_prob": args.dropout}
    shape = (len(tokenizer), tokenizer.pad_token_id, args.max_length, args.width, args.layers)
    config = models.bert_config(*shape, **rates, **settings)
    if kind == "CausalLM":
        ids = {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
        same = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
        shape = {name: getattr(config, name) for name in (*same, "pad_token_id")}
        config = transformers.LlamaConfig(
            intermediate_size=3 * args.width, attention_dropout=args.dropout, tie_word_embeddings=True, **ids, **shape
        )
    return getattr(transformers, f"AutoModelFor{kind}").from_config(config)


def new_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int) -> FastTokenizer:
    """Byte-level BPE learned from the texts, in BERT's form: [CLS] a [SEP], or [CLS] a [SEP] b [SEP].

    Raises UserError for a vocabulary too small for the 256 bytes and the special tokens.
    """
    try:
        learned = ff.BPETokenizer.train(
            iter(texts), vocab_size, special_tokens=SPECIAL_TOKENS, progress=sys.stderr.isatty()
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    with tempfile.TemporaryDirectory() as folder:
        learned.save(folder)
        backend = Tokenizer.from_file(f"{folder}/tokenizer.json")
    backend.post_processor = TemplateProcessing(
        single=f"{CLS} $A {SEP}",
        pair=f"{CLS} $A {SEP} $B:1 {SEP}:1",
        special_tokens=[(token, learned.token_to_id(token)) for token in (CLS, SEP)],
    )
    names = {"pad_token": PAD, "cls_token": CLS, "sep_token": SEP, "mask_token": MASK}
    return FastTokenizer(tokenizer_object=backend, model_max_length=max_length, **names)


def quiet() -> None:
    """What transformers says while it loads (new head, unused weights) is expected here."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def patch(model: torch.nn.Module, args: argparse.Namespace) -> None:
    """The one line that the recipes are about, unless --no-patch."""
    if args.patch:
        print(ff.patch(model))


def collator(model: torch.nn.Module, tokenizer: Any, packs: bool, per_token: bool = False) -> Any:
    """Packed batches for a patched model that takes them, batches padded to their longest sequence for any other."""
    if packs:
        try:
            return PackedCollator.for_model(model)
        except ValueError as error:
            print(f"Batches are padded: {error}.")
    if per_token:
        return transformers.DataCollatorForTokenClassification(tokenizer)
    return transformers.DataCollatorWithPadding(tokenizer)


def encode(tokenizer: Any, corpus: Corpus, max_length: int) -> list[dict[str, Any]]:
    """The rows of a corpus as a data set: input_ids and labels."""
    ids = tokenizer(corpus.texts, truncation=True, max_length=max_length)["input_ids"]
    return [{"input_ids": row, "labels": label} for row, label in zip(ids, corpus.labels, strict=True)]
