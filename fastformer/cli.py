"""The command line: fastformer demo | info | tune | bench | tokenizer, and --version.

Exit codes: 0 done; 1 failed; 2 the user's to fix, said in one sentence on stderr; 130 interrupted with Ctrl-C.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from fastformer.demo.errors import UserError
from fastformer.version import __version__

INTERRUPTED = 130
PER_PACKAGE = 500  # passages of each package in the default data


class Parser(argparse.ArgumentParser):
    """argparse with one sentence for an error instead of the usage and a sentence."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv`, sys.argv's by default. Returns the exit code."""
    hush_imports()
    try:
        args = _parser().parse_args(argv)
        code = _tokenizer(args) if "tokenizer_command" in args else args.run(args)
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"fastformer: {error}.", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output has had enough, as `| head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that flushing at exit is silent too
        return 1
    except KeyboardInterrupt:
        print("fastformer: interrupted.", file=sys.stderr)
        return INTERRUPTED


def hush_imports() -> None:
    """transformers imports torchao where there is one, which warns of libraries for other machines."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _parser() -> Parser:
    parser = Parser(prog="fastformer", description="Faster fine-tuning of Transformers, with the same numbers.")
    parser.add_argument("--version", action="version", version=f"fastformer {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_demo(commands)
    info = commands.add_parser("info", help="which backend runs on each device of this machine, and why")
    info.add_argument("--json", action="store_true", help="as JSON")
    info.add_argument(
        "--step",
        metavar="MODEL",
        help="instead: how many kernels a training step of a Hugging Face model launches on a GPU, stock and patched, "
        "and what is left to fuse, counted by the profiler where there is a GPU, else on the CPU; a checkpoint's "
        "folder or name, or a family (bert, roberta, gpt2, ...) of its usual size, with random weights",
    )
    info.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="of the parameters of that step (default: bfloat16); fp32 takes more of PyTorch's own products",
    )
    info.add_argument(
        "--autocast",
        choices=("bfloat16", "float16"),
        help="forward of that step under torch.autocast to this dtype, parameters in fp32, as Trainer's bf16=True and "
        "fp16=True have it (loss scaling is not counted)",
    )
    info.add_argument(
        "--layers", type=whole_number(1, 1000), metavar="N", help="of a family: layers instead of the usual number"
    )
    info.set_defaults(run=_info)
    _add_tune(commands)
    _add_bench(commands)
    _add_tokenizer(commands)
    return parser


def _add_tune(commands: Any) -> None:
    tune = commands.add_parser(
        "tune",
        help="time the attention kernels' tiles on this machine's GPU and write a table",
        description="Times the tiles of the attention kernels on this machine's GPU and writes the fastest to a table, "
        "which the kernels read with FASTFORMER_TILES=FILE. An existing table of these kernels is added to.",
    )
    tune.add_argument("--output", type=Path, default=Path("tiles.json"), metavar="FILE", help="(default: tiles.json)")
    tune.add_argument(
        "--head-dim",
        type=whole_number(1, 256),
        action="append",
        metavar="N",
        help="(repeatable; default: 64, 128, 256)",
    )
    tune.add_argument(
        "--length",
        type=whole_number(1, 1 << 20),
        action="append",
        metavar="N",
        help="tokens a sequence, one for each class up to 128, 512, 2048 and longer (repeatable; default: 128, 512, "
        "2048, 8192)",
    )
    tune.add_argument("--rehearse", action="store_true", help="without a GPU: tiny shapes in Triton's interpreter")
    tune.set_defaults(run=_tune)


def _tune(args: argparse.Namespace) -> int:
    from fastformer.ops.backend import triton_status

    usable, why = triton_status()
    if not usable:
        raise UserError(f"tuning needs Triton, but {why}")
    if args.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is decorated
        head_dims, lengths = args.head_dim or [16], args.length or [16, 24]
    else:
        import torch

        if not torch.cuda.is_available():
            raise UserError("tuning needs a CUDA GPU that PyTorch sees; --rehearse goes through it without one")
        head_dims, lengths = args.head_dim or [64, 128, 256], args.length or [32, 64, 128, 512, 2048, 8192]
    from fastformer.tune import tune

    try:
        count = tune(args.output, head_dims, lengths, tiny=args.rehearse)
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(str(error)) from None
    print(f"{count} rows in {args.output}; FASTFORMER_TILES={args.output} makes the kernels use them")
    return 0


def _add_bench(commands: Any) -> None:
    bench = commands.add_parser("bench", help="turn benchmark results into tables and plots (in a checkout)")
    report = bench.add_subparsers(metavar="COMMAND", required=True).add_parser(
        "report",
        help="tables and plots under bench/results/<device>/",
        description="Turns results into Markdown tables and PNG plots, every figure beside the best peer's and beside "
        "the machine's own limits. SOURCE: a file of pytest --benchmark --benchmark-json=FILE or a folder of make gpu.",
    )
    report.add_argument("source", nargs="+", type=Path, metavar="SOURCE")
    report.add_argument(
        "--output", type=Path, default=Path("bench/results"), metavar="FOLDER", help="(default: bench/results)"
    )
    report.set_defaults(run=_report)


def _report(args: argparse.Namespace) -> int:
    # The benchmarks are no part of the installed package: they are where `bench` of this repository is found.
    sys.path.insert(0, os.getcwd())
    try:
        from bench.report import ReportError, run
    except ImportError as error:
        raise UserError(f"fastformer bench works in the root of a checkout of fastformer ({error})") from None
    try:
        return run(args)
    except ReportError as error:
        raise UserError(str(error)) from None


def _add_tokenizer(commands: Any) -> None:
    try:
        from fastformer.tokenizer.cli import add_parser
    except ImportError as error:  # the C++ engine is not built: the other commands, info above all, must still run
        reason = str(error)

        def refuse(args: argparse.Namespace) -> NoReturn:
            raise UserError(f"the tokenizer cannot be imported: {reason}")

        # It takes whatever follows, so that the reason is what the user reads.
        parser = commands.add_parser("tokenizer", help=f"(not available: {reason})", prefix_chars="\0", add_help=False)
        parser.add_argument("rest", nargs="*")
        parser.set_defaults(run=refuse)
    else:
        add_parser(commands)


def _tokenizer(args: argparse.Namespace) -> int:
    """Run a tokenizer command; what it raises for its files and numbers is the user's to fix."""
    try:
        return args.run(args)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}" if error.filename else str(error)) from None
    except (ValueError, KeyError) as error:
        message = str(error.args[0] if isinstance(error, KeyError) else error)  # str of a KeyError is in quotes
        raise UserError(message.rstrip(".")) from None


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser(
        "demo",
        help="fine-tune a classifier stock and patched, side by side, and compare",
        description="Fine-tunes a text classifier three times from the same start: stock with padding to max_length, "
        "stock with dynamic padding, and patched. Without arguments it needs no download: the task is which package "
        "of Python's standard library a passage of source text comes from.",
    )
    data = demo.add_argument_group("your own data and checkpoint")
    data.add_argument("--data", type=Path, metavar="FILE", help="a .csv file with a header, or a .jsonl file; UTF-8")
    data.add_argument("--text-column", default="text", metavar="NAME", help="where the text is (default: text)")
    data.add_argument("--label-column", default="label", metavar="NAME", help="where the label is (default: label)")
    data.add_argument(
        "--model", metavar="NAME_OR_PATH", help="a Hugging Face checkpoint (default: a small BERT with random weights)"
    )
    data.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="tokenizer.json, .tiktoken or a vocabulary folder instead of learning one; with --model a Hugging Face "
        "tokenizer instead of the checkpoint's",
    )
    training = demo.add_argument_group("training")
    training.add_argument(
        "--max-length", type=whole_number(8, 1 << 20), default=256, metavar="N", help="tokens a passage (default: 256)"
    )
    training.add_argument("--epochs", type=whole_number(1, 10**6), default=2, metavar="N", help="(default: 2)")
    training.add_argument("--batch-size", type=whole_number(1, 10**6), default=16, metavar="N", help="(default: 16)")
    training.add_argument("--steps", type=whole_number(1, 10**9), metavar="N", help="stop each run after N batches")
    training.add_argument(
        "--learning-rate", type=learning_rate, metavar="X", help="(default: 5e-5 with --model, 1e-3 for the new BERT)"
    )
    training.add_argument("--seed", type=whole_number(0, 2**32 - 1), default=0, metavar="N", help="(default: 0)")
    result = demo.add_argument_group("result")
    result.add_argument(
        "--output", type=Path, default=Path("demo-output"), metavar="FOLDER", help="(default: demo-output/)"
    )
    result.add_argument("--no-plot", action="store_true", help="do not draw the picture")
    demo.set_defaults(run=_demo)


def _demo(args: argparse.Namespace) -> int:
    needed = {"transformers": "transformers", "sklearn": "scikit-learn", "tqdm": "tqdm"}
    if not args.no_plot:
        needed["matplotlib"] = "matplotlib"
    missing = [package for module, package in needed.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(f'the demo needs {", ".join(missing)}: pip install "fastformer[demo]"')
    # Everything that can be wrong with the input is found before torch is imported.
    from fastformer.demo.data import read_corpus, stdlib_corpus
    from fastformer.demo.report import output_folder

    if args.data is None:
        corpus = stdlib_corpus(PER_PACKAGE, args.seed)
    else:
        corpus = read_corpus(args.data, args.text_column, args.label_column)
    with output_folder(args.output) as output:
        print("fastformer demo: importing PyTorch and transformers", file=sys.stderr, flush=True)
        from fastformer.demo.app import fine_tune_and_compare

        fine_tune_and_compare(corpus, args, output)
    return 0


def _info(args: argparse.Namespace) -> int:
    if args.step is not None:
        from fastformer.launches.command import run

        if args.autocast is not None and args.dtype not in (None, "float32"):
            raise UserError(f"--autocast is for parameters of --dtype float32, got {args.dtype}")
        dtype = args.dtype or ("bfloat16" if args.autocast is None else "float32")
        return run(args.step, args.layers, args.json, dtype, args.autocast)
    for name in ("layers", "dtype", "autocast"):
        if getattr(args, name) is not None:
            raise UserError(f"--{name} goes with --step")
    from fastformer.info import info

    found = info()
    if args.json:
        import json

        print(json.dumps(found.as_dict(), indent=1))
    else:
        print(found)
    return 0


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """A converter of arguments to whole numbers from low to high."""

    def convert(text: str) -> int:
        if not text.isascii() or not text.isdigit() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"needs a whole number from {low} to {high}, got {text!r}")
        return int(text)

    return convert


def learning_rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate <= 1:
        raise argparse.ArgumentTypeError(f"needs a number above 0 and at most 1, got {text!r}")
    return rate


if __name__ == "__main__":
    sys.exit(main())
