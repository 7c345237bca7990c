"""The C++ engine under a fuzzer with address, undefined-behaviour and thread sanitizers."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


def build(folder: Path, sanitizers: str) -> Path:
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    sources = [*sorted((ROOT / "csrc" / "bpe").rglob("*.cpp")), ROOT / "tests" / "tokenizer" / "cpp" / "fuzz.cpp"]
    flags = ["-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Werror", f"-fsanitize={sanitizers}", "-pthread"]
    command = [COMPILER, *flags, "-fno-sanitize-recover=all", f"-I{ROOT / 'csrc'}"]
    objects = []
    running = []
    for source in sources:
        objects.append(folder / f"{source.parent.name}_{source.stem}.o")
        running.append(subprocess.Popen([*command, "-c", source, "-o", objects[-1]], stderr=subprocess.PIPE, text=True))
        if len(running) == 2:
            finish(running)
    finish(running)
    done = subprocess.run([*command, *objects, "-o", folder / "fuzz"], capture_output=True, text=True)
    if done.returncode and "cannot find" in done.stderr:
        pytest.skip(f"the compiler has no runtime for {sanitizers}")
    assert done.returncode == 0, done.stderr
    return folder / "fuzz"


def finish(running: list[subprocess.Popen[str]]) -> None:
    while running:
        process = running.pop()
        _, errors = process.communicate()
        assert process.returncode == 0, errors


def fuzz(program: Path, rounds: int, seed: int) -> None:
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run([program, str(rounds), str(seed)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == f"ok: {rounds} rounds\n"


def test_address_and_undefined(tmp_path: Path) -> None:
    fuzz(build(tmp_path, "address,undefined"), 60, 1)


@pytest.mark.slow
def test_address_and_undefined_at_length(tmp_path: Path) -> None:
    program = build(tmp_path, "address,undefined")
    for seed in range(2, 12):
        fuzz(program, 400, seed)


@pytest.mark.slow
def test_threads(tmp_path: Path) -> None:
    fuzz(build(tmp_path, "thread"), 40, 1)
