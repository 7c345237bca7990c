"""The tokenizer against its peers, one core, every measurement in a process of its own.

    python bench/bench_tokenizer.py --data FOLDER [--peers-python PYTHON] [--rounds 3] [--write]

FOLDER holds vocab/ (rank files cl100k_base.tiktoken, o200k_base.tiktoken, r50k_base.tiktoken; for tokenizers the same
names with .tokenizer.json or .tokenizer.json.xz) and text/ (*.txt.xz, short_strings.json.xz). PYTHON is an interpreter
that has the peers installed (tiktoken, gigatoken, fastokens, splintr-rs, wordchipper, bpe-openai, tokenizers); peers
that it lacks have a dash. Times are CPU time of the process (user and system), the best of the rounds, and rounds of
different libraries alternate, so that a busy machine slows all of them alike. --write puts the table, row by row, into
bench/results/cpu-<name>/tokenizer.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import lzma
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
VOCABULARIES = {"cl100k": "cl100k_base", "o200k": "o200k_base", "gpt2": "r50k_base"}
PEERS = ("fastformer", "tiktoken", "gigatoken", "fastokens", "splintr", "wordchipper", "bpe_openai", "tokenizers")
ADVERSARIAL = {
    "a": lambda n: "a" * n,
    "spaces": lambda n: " " * n,
    "newlines": lambda n: "\n" * n,
    "letters": lambda n: "".join(__import__("random").Random(1).choices("abcdefghijklmnopqrstuvwxyz", k=n)),
    "cjk": lambda n: "".join(map(chr, __import__("random").Random(2).choices(range(0x4E00, 0x9FA5), k=n // 3))),
    "digits": lambda n: "".join(__import__("random").Random(3).choices("0123456789", k=n)),
    "utf-8": lambda n: "".join(map(chr, __import__("random").Random(5).choices(range(0xA0, 0xD800), k=n // 3))),
    "base64": lambda n: __import__("base64").b64encode(__import__("random").Random(4).randbytes(n * 3 // 4)).decode(),
}

TEXTS = ("english", "code", "mixed", "cjk", "multilingual")

# Runs in the measuring process: argv is library, rank file, pattern, task, input file; prints seconds as JSON.
WORKER = r"""
import base64, json, lzma, os, shutil, sys, time
os.environ.update(RAYON_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
library, ranks, pattern, task, source = sys.argv[1:6]
text = open(source, encoding="utf-8", newline="").read()
EXPRESSIONS = json.loads(os.environ["FASTFORMER_BENCH_EXPRESSIONS"])

def load():
    if library == "fastformer":
        from fastformer.tokenizer import BPETokenizer
        return BPETokenizer.from_file(ranks, pattern=pattern)
    if library == "tiktoken":
        import tiktoken
        rows = (line.split() for line in open(ranks, "rb") if line.strip())
        table = {base64.b64decode(token): int(rank) for token, rank in rows}
        return tiktoken.Encoding("x", pat_str=EXPRESSIONS[pattern], mergeable_ranks=table, special_tokens={})
    if library == "gigatoken":
        import gigatoken
        return gigatoken.Tokenizer.from_tiktoken(ranks)
    if library == "fastokens":
        import fastokens
        if pattern == "gpt2":
            return fastokens.Tokenizer.from_tiktoken(ranks, special_tokens={}, pattern=EXPRESSIONS["gpt2"])
        return fastokens.Tokenizer.from_tiktoken(ranks, special_tokens={}, encoding=pattern + "_base")
    if library == "splintr":
        import splintr
        names = {"cl100k": "CL100K_BASE_PATTERN", "o200k": "O200K_BASE_PATTERN"}
        return splintr.Tokenizer(ranks, getattr(splintr, names[pattern]), {})
    if library == "wordchipper":
        return wordchipper.Tokenizer.from_pretrained(os.path.basename(ranks).removesuffix(".tiktoken"))
    if library == "tokenizers":
        import tokenizers
        stem = ranks.removesuffix(".tiktoken") + ".tokenizer.json"
        if os.path.exists(stem):
            return tokenizers.Tokenizer.from_file(stem)
        return tokenizers.Tokenizer.from_str(lzma.open(stem + ".xz", "rt", encoding="utf-8").read())
    from bpe_openai import _bindings
    return _bindings.tokenizer_for_encoding({"cl100k": "cl100k_base", "o200k": "o200k_base"}[pattern])

def encoder(tok):
    if library == "fastformer": return tok.encode_array
    if library == "tiktoken": return lambda s: tok.encode_to_numpy(s, disallowed_special=())
    if library == "fastokens": return tok.encode_ordinary
    if library == "splintr": return tok.encode_flat
    if library == "wordchipper": return lambda s: tok.encode(s, wordchipper.SpecialFilter.include_none())
    if library == "tokenizers": return lambda s: tok.encode(s, add_special_tokens=False)
    return tok.encode

def lister(tok):
    if library == "fastformer": return tok.encode
    if library == "tiktoken": return tok.encode_ordinary
    if library == "gigatoken": return lambda s: tok.encode(s).tolist()
    if library == "fastokens": return lambda s: list(tok.encode_ordinary(s).ids)
    if library == "wordchipper": return encoder(tok)
    if library == "tokenizers": return lambda s: tok.encode(s, add_special_tokens=False).ids
    return tok.encode

def batcher(tok):
    if library == "fastformer": return tok.encode_packed
    if library == "tiktoken": return lambda b: [tok.encode_ordinary(s) for s in b]
    if library == "gigatoken": return lambda b: tok.encode_batch(b, parallel=False)
    if library == "fastokens": return lambda b: tok.encode_batch_flat(b)
    if library == "splintr": return lambda b: tok.encode_batch_flat(b)
    if library == "tokenizers": return lambda b: tok.encode_batch_fast(b, add_special_tokens=False)
    return lambda b, run=encoder(tok): [run(s) for s in b]

clock = time.process_time
MODULES = {"fastformer": "fastformer.tokenizer", "bpe_openai": "bpe_openai._bindings"}
if library == "fastformer":
    sys.path.insert(0, os.environ["FASTFORMER_BENCH_ROOT"])
if library == "wordchipper":  # knows vocabularies by name only, and looks for them in a folder of its own
    name = os.path.basename(ranks).removesuffix(".tiktoken")
    os.environ["WORDCHIPPER_CACHE_DIR"] = os.path.join(os.path.dirname(source), "wordchipper")
    kept = os.path.join(os.environ["WORDCHIPPER_CACHE_DIR"], "openai", name)
    os.makedirs(kept, exist_ok=True)
    shutil.copy(ranks, kept)
    import wordchipper
__import__(MODULES.get(library, library))
if task == "cached":
    from fastformer.tokenizer import BPETokenizer
    BPETokenizer.from_file(ranks, pattern=pattern).save(source + ".ffbpe")
    ranks, pattern = source + ".ffbpe", None
start = clock(); tok = load(); loaded = clock() - start
times = []
if task in ("load", "cached"):
    times = [loaded]
elif task == "encode":
    run = encoder(tok)
    for _ in range(3):
        start = clock(); out = run(text); times.append(clock() - start)
elif task == "batch":
    strings, run = json.loads(text), batcher(tok)
    for _ in range(2):
        start = clock(); out = run(strings); times.append(clock() - start)
elif task == "call":
    run = lister(tok)
    for _ in range(200): run(text)
    for _ in range(7):
        start = clock()
        for _ in range(5000): run(text)
        times.append((clock() - start) / 5000)
    times = [min(times)]
elif task == "decode":
    import numpy
    ids = numpy.asarray(lister(tok)(text), dtype=numpy.uint32)
    run = tok.decode if library == "gigatoken" else tok.decode_bytes if hasattr(tok, "decode_bytes") else None
    if run is None:
        run = (lambda i: tok.decode(i, False)) if library == "fastokens" else tok.decode
    try:
        run(ids[:10]); given = ids
    except Exception:
        given = ids.tolist()
    for _ in range(3):
        start = clock(); out = run(given); times.append(clock() - start)
    times = [min(times)]
print(json.dumps(times))
"""


def measure(python: str, library: str, vocab: Path, pattern: str, task: str, source: Path) -> list[float] | None:
    """Seconds of each repetition in a fresh process, or None where the library cannot do it."""
    if task == "cached" and library != "fastformer":
        return None
    sys.path.insert(0, str(ROOT))
    from fastformer.tokenizer.patterns import CL100K, O200K

    gpt2 = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
    environment = {
        **os.environ,
        "FASTFORMER_BENCH_ROOT": str(ROOT),
        "FASTFORMER_BENCH_EXPRESSIONS": json.dumps({"cl100k": CL100K, "o200k": O200K, "gpt2": gpt2}),
    }
    interpreter = sys.executable if library == "fastformer" else python
    command = [interpreter, "-c", WORKER, library, str(vocab), pattern, task, str(source)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    except subprocess.TimeoutExpired:
        return None
    return json.loads(done.stdout) if done.returncode == 0 else None


def best(rows: list[list[float] | None]) -> list[float] | None:
    found = [row for row in rows if row is not None]
    return [min(column) for column in zip(*found, strict=True)] if found else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--peers-python", default=sys.executable)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megabytes", type=float, default=16, help="of each text at most")
    parser.add_argument("--patterns", nargs="+", default=list(VOCABULARIES), choices=list(VOCABULARIES))
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=PEERS)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    lines = [
        "# Tokenizer, one core",
        "",
        f"{datetime.date.today()}, {cpu_name()}, Python {platform.python_version()}, commit {commit()}. "
        f"CPU time, best of {args.rounds} alternating rounds, at most "
        f"{args.megabytes:g} MB a text; MB/s of UTF-8 as cold/warm (first pass and best later "
        "one); load in ms; one call to a list in µs. A dash: the library cannot do it, or took over five minutes.",
    ]
    print("\n".join(lines), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        tasks = list(prepare(args.data / "text", Path(folder), int(args.megabytes * 1e6)))
        lines += linear(args, Path(folder))
        for pattern in args.patterns:
            head = [
                "",
                f"## {pattern}",
                "",
                "| | " + " | ".join(args.peers) + " |",
                "|---" * (len(args.peers) + 1) + "|",
            ]
            print("\n".join(head), flush=True)
            lines += head
            for name, task, source in tasks:
                if pattern != "cl100k" and name not in TEXTS:
                    continue
                rows: dict[str, list[list[float] | None]] = {peer: [] for peer in args.peers}
                vocab = args.data / "vocab" / f"{VOCABULARIES[pattern]}.tiktoken"
                for _ in range(args.rounds):
                    for peer in args.peers:
                        rows[peer].append(measure(args.peers_python, peer, vocab, pattern, task, source))
                size = source.stat().st_size
                cells = [show(task, best(rows[peer]), size) for peer in args.peers]
                lines.append(f"| {name} | " + " | ".join(cells) + " |")
                print(lines[-1], flush=True)
                save(lines, args.write)


def save(lines: list[str], write: bool) -> None:
    """The table so far into bench/results, if asked to: a run of an hour that is ended leaves what it has."""
    if not write:
        return
    target = ROOT / "bench" / "results" / f"cpu-{re.sub('[^a-z0-9]+', '-', cpu_name().lower()).strip('-')}"
    target.mkdir(parents=True, exist_ok=True)
    (target / "tokenizer.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def linear(args: argparse.Namespace, folder: Path) -> list[str]:
    """Whether hard inputs of one pretoken take time in proportion to their size: cold MB/s by size."""
    sizes = {"64 KB": 1 << 16, "1 MB": 1 << 20, "16 MB": 1 << 24}
    lines = ["", "## One input, growing (fastformer, cl100k)", "", "| | " + " | ".join(sizes) + " |", "|---" * 4 + "|"]
    for label, make in ADVERSARIAL.items():
        cells = []
        for size in sizes.values():
            path = folder / "growing"
            path.write_text(make(size), encoding="utf-8")
            vocab = args.data / "vocab" / f"{VOCABULARIES['cl100k']}.tiktoken"
            times = measure(args.peers_python, "fastformer", vocab, "cl100k", "encode", path)
            cells.append(f"{path.stat().st_size / times[0] / 1e6:.1f}" if times else "–")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    return lines


def prepare(texts: Path, folder: Path, limit: int) -> list[tuple[str, str, Path]]:
    """The inputs as plain files: (name, task, file)."""
    out = []
    for name in TEXTS:
        whole = lzma.decompress((texts / f"{name}.txt.xz").read_bytes())
        # An equal share of every tenth: a mixed text is not mixed in every part.
        share, step = min(len(whole), limit) // 10, len(whole) // 10
        parts = [whole[i * step : i * step + share].decode("utf-8", "ignore") for i in range(10)]
        (folder / name).write_text("".join(parts), encoding="utf-8", newline="")
        out.append((name, "encode", folder / name))
    english = lzma.decompress((texts / "english.txt.xz").read_bytes())
    for label, size in (("english 0.1 MB", 100_000), ("english 1 MB", 1_000_000)):
        path = folder / label.replace(" ", "_")
        path.write_bytes(english[:size].decode("utf-8", "ignore").encode())
        out.append((label, "encode", path))
    (folder / "strings").write_bytes(lzma.decompress((texts / "short_strings.json.xz").read_bytes()))
    out.append(("50,000 short strings", "batch", folder / "strings"))
    for label, text in (
        ("call: Hello world", "Hello world"),
        ("call: 200 bytes", english[1000:1200].decode("utf-8", "ignore")),
    ):
        path = folder / label.replace(" ", "_").replace(":", "")
        path.write_text(text, encoding="utf-8")
        out.append((label, "call", path))
    for label, make in ADVERSARIAL.items():
        path = folder / f"adversarial_{label}"
        path.write_text(make(1_000_000), encoding="utf-8")
        out.append((f"1 MB: {label}", "encode", path))
    out.append(("decode english", "decode", folder / "english"))
    out.append(("load", "load", folder / "english_0.1_MB"))
    out.append(("load .ffbpe", "cached", folder / "english_0.1_MB"))
    return out


def show(task: str, times: list[float] | None, size: int) -> str:
    if not times:
        return "–"
    if task in ("load", "cached"):
        return f"{times[0] * 1e3:.0f}"
    if task == "call":
        return f"{times[0] * 1e6:.2f}"
    if task == "decode":
        return f"{size / times[0] / 1e6:.0f}"
    return f"{size / times[0] / 1e6:.1f}/{size / min(times[1:]) / 1e6:.1f}"


def cpu_name() -> str:
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return (
        found.group(1).replace("(R)", "").replace("(TM)", "") if found else platform.processor() or platform.machine()
    )


def commit() -> str:
    done = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
