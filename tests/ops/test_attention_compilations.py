"""How many kernels a fine-tuning run compiles: lengths change from batch to batch, kernels do not.

Compilation and launches are stand-ins, as in tests/test_launch.py.
"""

import collections
import os
from unittest import mock

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from triton.compiler import CompiledKernel  # noqa: E402

from bench.standin import standing_in  # noqa: E402
from fastformer.kernels.attention import backward, decode, forward  # noqa: E402, F401  (imported before the stand-in)
from fastformer.ops.attention import (  # noqa: E402
    attention_kv_cache,
    attention_varlen,
    kernel,
    scaled_dot_product_attention,
)
from fastformer.ops.operator import Kinds  # noqa: E402

HEADS, WIDTH = 12, 64


@pytest.fixture
def compiled(monkeypatch):
    """Counts compilations by kernel."""
    found, functions = collections.Counter(), []

    def compile_nothing(source, **_):
        found[source.fn.__name__] += 1
        functions.append(source.fn)
        built = object.__new__(CompiledKernel)
        built.src, built.module, built.function, built.packed_metadata = source, object(), object(), object()
        built.name, built._run = "nothing", lambda *args: None
        return built

    monkeypatch.setattr(kernel, "_kinds", Kinds())
    with mock.patch("triton.compiler.compile", compile_nothing), standing_in("sm_90"):
        yield found
    for function in functions:
        function.device_caches.clear()


def projected(*rows):
    """Query, key and value as one product leaves them, (..., H, D)."""
    return torch.empty(*rows, 3, HEADS, WIDTH, dtype=torch.bfloat16).requires_grad_().unbind(-3)


LENGTHS = (130, 131, 136, 144, 160, 193, 200, 255, 256, 300)


@pytest.mark.parametrize("mask", [None, "padding", "learned"])
def test_padded_batches_of_any_length(mask, compiled):
    """A learned bias is read in vectors where its rows are aligned, which is a kernel of its own."""
    for length in LENGTHS:
        query, key, value = (x.transpose(1, 2) for x in projected(4, length))
        given = {
            None: None,
            "padding": torch.ones(4, 1, 1, length, dtype=torch.bool),
            "learned": torch.empty(1, HEADS, length, length, dtype=torch.bfloat16),
        }[mask]
        out, lse = scaled_dot_product_attention(query, key, value, given, 0.1, return_lse=True)
        torch.autograd.grad((out, lse), (query, key, value), (torch.empty_like(out), torch.empty_like(lse)))
    times = 2 if mask == "learned" else 1
    assert compiled == dict.fromkeys(("_forward", "backward_query", "backward_key"), times)


def test_packed_batches_of_any_number_of_tokens(compiled):
    for tokens in LENGTHS:
        query, key, value = projected(tokens)
        bounds = torch.tensor([0, 3, tokens], dtype=torch.int32)
        out = attention_varlen(query, key, value, bounds, bounds, tokens, tokens, 0.1)
        torch.autograd.grad(out, (query, key, value), torch.empty_like(out))
    assert compiled == dict.fromkeys(("_forward", "backward_query", "backward_key"), 1)


def test_short_batches_of_any_length(compiled):
    """A tile holds all keys, so there is one for 64 tokens and one for 128."""
    for length in (33, 40, 48, 63, 64, 65, 96, 100, 127, 128):
        query, key, value = (x.transpose(1, 2) for x in projected(4, length))
        out = scaled_dot_product_attention(query, key, value, None, 0.1)
        torch.autograd.grad(out, (query, key, value), torch.empty_like(out))
    # Of 128, once for rows that fit one tile of queries and once for more.
    assert compiled == {"short_forward": 2, "short_backward": 2}


def test_a_growing_paged_cache(compiled):
    cache = torch.empty(64, 16, 2, WIDTH, dtype=torch.bfloat16)
    query, lengths = torch.empty(2, 1, HEADS, WIDTH, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.int32)
    for pages in (17, 18, 24, 32, 40):
        attention_kv_cache(query, cache, cache, lengths, torch.zeros(2, pages, dtype=torch.int32))
    assert compiled["_attend"] == 1
