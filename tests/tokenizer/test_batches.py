"""Many texts at once: threads, Arrow, invalid bytes; and the call that goes past Python."""

import inspect
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastformer.tokenizer import BPETokenizer, _bpe, training
from tests.tokenizer.conftest import hard_strings

pa = pytest.importorskip("pyarrow")


@pytest.fixture(scope="module")
def tok(ranks_file: Path) -> BPETokenizer:
    return BPETokenizer.from_file(ranks_file, pattern="cl100k", special_tokens={"<pad>": 5000})


def rows(packed: tuple[np.ndarray, np.ndarray]) -> list[list[int]]:
    ids, ends = packed
    assert ids.dtype == np.uint32
    assert ends.dtype == np.int32
    assert ends[0] == 0
    assert ends[-1] == len(ids)
    return [ids[low:high].tolist() for low, high in itertools.pairwise(ends)]


def test_batches_equal_single_texts(tok: BPETokenizer) -> None:
    texts: list[str | bytes] = [*hard_strings(3000, seed=70), "", "a" * 5000, "世界 " * 9000, "", "\ud83d\ude00 \ud800"]
    texts += [b"plain bytes", b"\xff\xfe broken", b"", "é".encode()[:1], memoryview(b"view of it"), "\n" * 4096]
    texts *= 4
    want = [tok.encode(text) for text in texts]
    for threads in (1, 2, 7):
        assert rows(tok.encode_packed(texts, threads=threads)) == want
        assert tok.encode_batch(texts, threads=threads) == want
    assert rows(tok.encode_packed([])) == []
    assert rows(tok.encode_packed(iter(["a", "b"]))) == [tok.encode("a"), tok.encode("b")]


def test_threads_on_much_text(tok: BPETokenizer) -> None:
    texts = ["".join(hard_strings(40, seed=seed, longest=30)) for seed in range(120)] * 12
    assert sum(len(text.encode()) for text in texts) > 3 << 18
    one, four = tok.encode_packed(texts), tok.encode_packed(texts, threads=4)
    assert np.array_equal(one[0], four[0])
    assert np.array_equal(one[1], four[1])


def test_batch_errors(tok: BPETokenizer) -> None:
    for threads in (0, -1, 1.5):
        with pytest.raises(ValueError, match="threads"):
            tok.encode_packed(["a"], threads=threads)  # type: ignore[arg-type]
    for bad in (["a", 3], [None]):
        with pytest.raises(TypeError, match="text must be str"):
            tok.encode_packed(bad)
    with pytest.raises(TypeError):
        tok.encode_packed(3)


def test_arrow(tok: BPETokenizer) -> None:
    texts = [*hard_strings(200, seed=71), None, "", "last"]
    want = [tok.encode(text or "") for text in texts]
    for kind in (pa.string(), pa.large_string()):
        array = pa.array(texts, kind)
        assert rows(tok.encode_packed(array)) == want
        assert rows(tok.encode_packed(array.slice(7, 150), threads=2)) == want[7:157]
        chunked = pa.chunked_array([array.slice(0, 50), array.slice(50, 0), array.slice(50)])
        assert rows(tok.encode_packed(chunked)) == want
        assert rows(tok.encode_packed(pa.table({"t": chunked})["t"])) == want
    assert rows(tok.encode_packed(pa.array([], pa.string()))) == []
    for bad in (pa.array([1, 2]), pa.array([b"a"]), pa.array(["a"]).dictionary_encode(), pa.table({"t": ["a"]})):
        with pytest.raises(ValueError, match="Arrow type"):
            tok.encode_packed(bad)


def test_results_outlive_the_tokenizer(ranks_file: Path) -> None:
    ids = BPETokenizer.from_file(ranks_file, pattern="cl100k").encode_array("Hello world " * 1000)
    copy = ids.copy()
    ids[0] += 1  # the array owns its memory
    ids[0] -= 1
    assert np.array_equal(ids, copy)


def test_encode_past_python(tok: BPETokenizer) -> None:
    text = "a <pad> b"
    plain = tok.encode(text)
    assert tok.encode(text=text) == plain
    assert tok.encode(text, allowed_special=(), disallowed_special=set()) == plain
    assert tok.encode(text, allowed_special=[]) == plain
    assert 5000 in tok.encode(text, allowed_special={"<pad>"})
    assert list(inspect.signature(tok.encode).parameters) == ["text", "allowed_special", "disallowed_special"]
    for bad in ((), (text, "all"), (text, text, text)):
        with pytest.raises(TypeError):
            tok.encode(*bad)
    with pytest.raises(TypeError, match="nonsense"):
        tok.encode(text, nonsense=1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="Engine"):
        tok._bind("text", 1)  # type: ignore[arg-type]

    class Shouting(BPETokenizer):
        def encode(self, text: str | bytes, **options: object) -> list[int]:
            return super().encode(str(text).upper())

    assert Shouting(tok._model).encode("abc") == tok.encode("ABC")
    with pytest.raises(TypeError):
        BPETokenizer.__new__(BPETokenizer).encode()  # type: ignore[call-arg]
    with pytest.raises(AttributeError):
        BPETokenizer.__new__(BPETokenizer).encode("a")


def test_training_with_threads(tmp_path: Path) -> None:
    path = tmp_path / "text"
    lines = hard_strings(20_000, seed=72, longest=30)
    path.write_bytes("\n".join(lines).encode() + b"\n" + b"x" * 2_000_000)
    blocks = list(training._blocks(path, 1000))
    assert b"".join(block for _, block in blocks) == path.read_bytes()
    position = 0
    for base, block in blocks:
        assert base == position
        assert block.endswith(b"\n") or block is blocks[-1][1]
        position += len(block)
    one, four = (BPETokenizer.train(path, 400, threads=threads) for threads in (1, 4))
    assert one._model.merges == four._model.merges
    path.write_bytes(b"a\n" * 1_000_000 + b"\xff")
    with pytest.raises(ValueError, match="byte 2000000 is no character"):
        BPETokenizer.train(path, 300, threads=2)
    with pytest.raises(ValueError, match="threads"):
        BPETokenizer.train(path, 300, threads=0)


def test_subinterpreter(ranks_file: Path) -> None:
    """The engine in two interpreters of one process, used in turn and torn down; the package's Python side needs numpy,
    which says itself that it serves one interpreter only."""
    script = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("_bpe", {_bpe.__file__!r})
_bpe = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_bpe)
engine = _bpe.Engine.from_ranks(open({str(ranks_file)!r}, "rb").read(), [], b"")
ids = engine.encode("Hello world, 世界" * 200, 1)
assert engine.decode(ids).decode() == "Hello world, 世界" * 200
memoryview(engine.encode_array("abc", 1))
"""
    code = f"""
try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters
script = {script!r}
exec(script)
for _ in range(3):
    other = interpreters.create()
    failure = interpreters.run_string(other, script)
    assert failure is None, failure
    interpreters.destroy(other)
    exec(script)
print("done")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "done\n", done.stderr
