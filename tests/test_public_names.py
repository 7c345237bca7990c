"""Every public name resolves, and importing the package stays light."""

import subprocess
import sys

import pytest

import fastformer as ff


@pytest.mark.parametrize("name", ff.__all__)
def test_top_level(name):
    assert getattr(ff, name) is not None
    assert name in dir(ff)


@pytest.mark.parametrize("name", ff.ops.__all__)
def test_operators(name):
    assert callable(getattr(ff.ops, name))


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        ff.nothing  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        ff.ops.nothing  # noqa: B018


def test_importing_imports_neither_triton_nor_transformers():
    code = (
        "import sys, fastformer as ff; assert 'torch' not in sys.modules; "
        "ff.ops.layer_norm, ff.ops.attention_varlen, ff.nn, ff.patch, ff.info, ff.BPETokenizer, ff.explain.html; "
        "print(sorted({'triton', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
