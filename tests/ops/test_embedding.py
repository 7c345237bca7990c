"""Embedding, LayerNorm and dropout of BERT-class models."""

import random
import warnings

import pytest
import torch
import torch.nn.functional as F
from checking import compare, fenced

from fastformer.ops import embedding
from fastformer.ops.embedding import embedding_layer_norm, number_tokens


def random_case(number, device, dtypes):
    pick = random.Random(number)
    generator = torch.Generator().manual_seed(number)
    lead = pick.choice([(7,), (2, 5), (3, 1), (0, 4), (33,)])
    width = pick.choice([1, 3, 16, 100, 257])
    dtype = pick.choice(dtypes)
    wide = pick.choice([dtype, torch.float32])

    def ids(limit):
        return torch.randint(0, limit, lead, generator=generator).to(device, pick.choice([torch.int64, torch.int32]))

    # A table's own rows are read where they lie; only its outside may be poison.
    tensors = {"word": fenced((20, width), dtype, generator, device)}
    options = {"input_ids": ids(20), "eps": 1e-5, "padding_idx": pick.choice([None, 0, -1])}
    if pick.random() < 0.7:
        tensors["position"] = fenced((40, width), dtype, generator, device)
        options["position_ids"] = ids(40) if pick.random() < 0.5 else None
        options["position_padding_idx"] = pick.choice([None, 0, -39])
    if pick.random() < 0.7:
        tensors["token_type"] = fenced((2, width), dtype, generator, device)
        options["token_type_ids"] = ids(2) if pick.random() < 0.5 else None
    if pick.random() < 0.8:
        tensors["weight"] = fenced((width,), wide, generator, device)
        tensors["bias"] = fenced((width,), wide, generator, device)
    if pick.random() < 0.6:
        options |= {"dropout_p": 0.3, "dropout_seed": torch.tensor([number * 31], device=device)}
    return (lambda **leaves: embedding_layer_norm(**leaves, **options)), tensors


@pytest.mark.parametrize("number", range(30))
def test_fuzz(number, device, interpreting, monkeypatch, poisoned):
    dtypes = [torch.float32, torch.float16] + ([] if interpreting else [torch.bfloat16])
    compare(*random_case(number, device, dtypes), monkeypatch, number)


@pytest.mark.slow
@pytest.mark.parametrize("batch", range(1, 6))
def test_fuzz_long(batch, device, interpreting, monkeypatch, poisoned):
    dtypes = [torch.float32, torch.float16] + ([] if interpreting else [torch.bfloat16])
    for number in range(batch * 1000, batch * 1000 + 60):
        compare(*random_case(number, device, dtypes), monkeypatch, number)


def test_torch_backend_is_stock_bit_for_bit(monkeypatch):
    monkeypatch.setenv("FASTFORMER_BACKEND", "torch")
    word, place, kind = torch.randn(20, 16), torch.randn(9, 16), torch.randn(2, 16)
    w, b, ids, types = torch.randn(16), torch.randn(16), torch.randint(0, 20, (3, 7)), torch.randint(0, 2, (3, 7))
    total = F.embedding(ids, word) + F.embedding(types, kind) + F.embedding(torch.arange(7).expand(3, 7), place)
    ours = embedding_layer_norm(ids, word, place, kind, w, b, token_type_ids=types)
    assert torch.equal(ours, F.layer_norm(total, (16,), w, b, 1e-12))


def test_padding_row_gets_no_gradient(device):
    torch.manual_seed(0)
    word = torch.randn(5, 16, device=device, requires_grad=True)
    # Not the sum of squares, which a norm holds nearly constant: its gradient is rounding and may be 0 everywhere.
    embedding_layer_norm(torch.tensor([0, 1, 4], device=device), word, padding_idx=1).sin().sum().backward()
    assert (word.grad[1] == 0).all()
    assert (word.grad[[2, 3]] == 0).all()
    assert (word.grad[0] != 0).any()


@pytest.mark.parametrize("given", [False, True])
def test_padding_position_gets_no_gradient(device, given):
    torch.manual_seed(0)
    ids, word = torch.tensor([[0, 1, 4]], device=device), torch.randn(5, 16, device=device)
    position = torch.randn(5, 16, device=device, requires_grad=True)
    places = torch.tensor([[2, 3, 1]], device=device) if given else None
    out = embedding_layer_norm(ids, word, position, position_ids=places, position_padding_idx=-4)
    out.sin().sum().backward()
    touched = (position.grad != 0).any(1).tolist()
    assert touched == ([False, False, True, True, False] if given else [True, False, True, False, False])


@pytest.mark.parametrize(("length", "dtype"), [(9, torch.int32), (1030, torch.int64)])
def test_numbered_tokens(device, length, dtype):
    torch.manual_seed(0)
    ids = torch.randint(0, 4, (3, length), device=device, dtype=dtype)
    ids[1] = 1
    expected = []
    for row in ids.tolist():
        count, places = 1, []
        for token in row:
            count += token != 1
            places.append(count if token != 1 else 1)
        expected.append(places)
    found = number_tokens(ids, 1)
    assert found.dtype == torch.int64
    assert found.tolist() == expected
    assert number_tokens(ids[:, :0], 1).shape == (3, 0)
    # Not contiguous.
    assert torch.equal(number_tokens(ids[:, 1::2], 1), number_tokens(ids[:, 1::2].contiguous(), 1))


def test_id_beyond_the_table_is_never_a_number(device, interpreting):
    word, ids = torch.randn(5, 16, device=device), torch.tensor([1, 5], device=device)
    if device.type == "cpu" and not interpreting:
        with pytest.raises(IndexError):
            embedding_layer_norm(ids, word)
    else:
        out = embedding_layer_norm(ids, word)
        assert out[0].isfinite().all()
        assert out[1].isnan().all()


def test_bad_arguments(device):
    ids, word = torch.zeros(2, 6, dtype=torch.int64, device=device), torch.randn(5, 8, device=device)
    with pytest.raises(TypeError, match="input_ids must be one of int64, int32"):
        embedding_layer_norm(ids.float(), word)
    with pytest.raises(ValueError, match=r"position must have shape \(any, 8\)"):
        embedding_layer_norm(ids, word, word[:, :4])
    with pytest.raises(ValueError, match="position must have a row for each of 6 positions, got 5"):
        embedding_layer_norm(ids, word, word)
    with pytest.raises(ValueError, match="position_padding_idx must be a row of a table of 6, got 6"):
        embedding_layer_norm(ids, word, torch.randn(6, 8, device=device), position_padding_idx=6)
    with pytest.raises(ValueError, match=r"token_type_ids must have shape \(2, 6\)"):
        embedding_layer_norm(ids, word, token_type=word, token_type_ids=ids[:1])
    with pytest.raises(TypeError, match="token_type must be one of float32"):
        embedding_layer_norm(ids, word, token_type=word.half())


def test_full_route(device, interpreting):
    if not interpreting and device.type == "cpu":
        pytest.skip("the CPU backend registers no operator")
    ids = torch.tensor([[0, 3, 4]], device=device)
    word, place = (torch.randn(5, 8, device=device, requires_grad=True) for _ in range(2))
    w, b = (torch.randn(8, device=device, requires_grad=True) for _ in range(2))
    seed = torch.tensor([3], device=device)
    args = (ids, None, None, word, place, None, w, b, seed, 0.2, 1e-5, -1, -1, torch.float32, True)
    torch.library.opcheck(embedding._embed_op.op, args)


def test_second_derivative(device):
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([[1, 3, 1], [0, 2, 3]], device=device)
    leaves = [torch.randn(shape, generator=generator).to(device) for shape in ((4, 9), (3, 9), (9,), (9,))]

    def penalty(call, leaves):
        leaves = [t.clone().requires_grad_() for t in leaves]
        first = torch.autograd.grad(call(*leaves).sin().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    def ours(word, place, weight, bias):
        return embedding_layer_norm(ids, word, place, None, weight, bias, 1e-5)

    def stock(word, place, weight, bias):
        return F.layer_norm(F.embedding(ids, word) + place, (9,), weight, bias)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = penalty(ours, leaves)
    for a, b in zip(found, penalty(stock, [t.double() for t in leaves]), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def test_compile(device):
    ids = torch.tensor([[1, 3, 1], [0, 2, 3]], device=device)
    word, weight = (torch.randn(shape, device=device, requires_grad=True) for shape in ((4, 9), (9,)))

    def step(word, weight):
        return embedding_layer_norm(ids, word, weight=weight).sin().sum()

    eager = torch.autograd.grad(step(word, weight), (word, weight))
    compiled = torch.autograd.grad(
        torch.compile(step, backend="aot_eager", fullgraph=True)(word, weight), (word, weight)
    )
    for a, c in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, c)
