"""Attention as a part of programs: torch.compile, export, autocast, torch.func, and in the place of PyTorch's own."""

import shutil

import pytest
import torch
import torch.nn.functional as F

from fastformer.ops import attention_varlen, scaled_dot_product_attention


def draw(device, length=12, heads=2, dim=16, dtype=torch.float32, grad=True):
    generator = torch.Generator().manual_seed(length)
    shape = (2, heads, length, dim)
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_(grad) for _ in range(3)]


def dense(query, key, value):
    out, lse = scaled_dot_product_attention(query, key, value, is_causal=True, softcap=3.0, return_lse=True)
    return out.sin(), lse


def packed(query, key, value):
    """The first sequence of the batch cut in two, the second whole."""
    length = query.shape[2]
    bounds = torch.tensor([0, 1, 5, 5], device=query.device).int() + torch.tensor(
        [0, 0, 0, 1], device=query.device
    ).int() * (2 * length - 5)
    flat = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]
    return attention_varlen(*flat, bounds, bounds, 2 * length, 2 * length, is_causal=True, window=(3, 0)).cos()


@pytest.fixture(autouse=True)
def _no_graphs_left():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def outputs_and_gradients(function, tensors):
    outputs = function(*tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return *outputs, *torch.autograd.grad(sum(o.square().sum() for o in outputs), tensors)


@pytest.mark.filterwarnings("ignore")  # PyTorch's own, of its compiler
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("function", [dense, packed])
def test_compiled_whole_for_every_length(function, backend, device, interpreting):
    if backend == "inductor" and (interpreting or (device.type == "cpu" and not shutil.which("g++"))):
        pytest.skip("inductor needs a C++ compiler, and does not go with the interpreter")
    compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=True)
    for length in (12, 19):
        tensors = draw(device, length)
        for a, b in zip(
            outputs_and_gradients(compiled, tensors), outputs_and_gradients(function, tensors), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.filterwarnings("ignore")
def test_exported(device, interpreting):
    class Model(torch.nn.Module):
        def forward(self, query, key, value):
            return dense(query, key, value)[0] + packed(query, key, value).view(2, -1, 2, 16).transpose(1, 2)

    tensors = draw(device, grad=False)
    length = torch.export.Dim("length", min=6, max=64)
    program = torch.export.export(Model(), tuple(tensors), dynamic_shapes=[{2: length}] * 3)
    for other in (tensors, draw(device, 19, grad=False)):
        torch.testing.assert_close(program.module()(*other), Model()(*other), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("function", [dense, packed])
def test_autocast_computes_in_the_lower_dtype_and_hands_back_float32_gradients(function, device, interpreting):
    dtype = torch.float16 if interpreting else torch.bfloat16
    tensors = draw(device)
    exact = outputs_and_gradients(function, tensors)
    with torch.autocast(device.type, dtype=dtype):
        out = function(*tensors)
        out = out[0] if isinstance(out, tuple) else out
    assert out.dtype == dtype
    gradients = torch.autograd.grad(out.float().square().sum(), tensors)
    assert all(g.dtype == torch.float32 for g in gradients)
    torch.testing.assert_close(out.float(), exact[0], rtol=0.05, atol=0.05)


def test_vmap_works_or_says_why_not(device):
    """Over batches of batches: the same as one call after another, or one sentence of what cannot be done."""
    query, key, value = (torch.stack([x, x * 0.5, -x]).detach() for x in draw(device))

    def one(q, k, v):
        return scaled_dot_product_attention(q, k, v, is_causal=True)

    expected = torch.stack([one(*each) for each in zip(query, key, value, strict=True)])
    torch.testing.assert_close(torch.func.vmap(one)(query, key, value), expected, rtol=1e-5, atol=1e-6)


def test_vmap_of_a_derivative(device):
    query, key, value = (torch.stack([x, x * 0.5]).detach() for x in draw(device))

    def loss(q, k, v):
        return scaled_dot_product_attention(q, k, v).square().sum()

    expected = torch.stack([torch.func.grad(loss)(*each) for each in zip(query, key, value, strict=True)])
    got = torch.func.vmap(torch.func.grad(loss))(query, key, value)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def counted(monkeypatch):
    calls = []

    def ours(*args, **kwargs):
        calls.append(kwargs)
        return scaled_dot_product_attention(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", ours)
    return calls


@pytest.mark.parametrize("masks", [{}, {"is_causal": True}, {"padding": True}])
def test_in_the_place_of_pytorchs_own_inside_torch_nn(masks, device, monkeypatch):
    torch.manual_seed(0)
    layer = torch.nn.TransformerDecoderLayer(32, 2, 48, 0.0, batch_first=True).to(device)
    x, memory = (torch.randn(2, n, 32, device=device, requires_grad=True) for n in (9, 7))
    given = {}
    if masks.get("is_causal"):
        given = {"tgt_mask": torch.nn.Transformer.generate_square_subsequent_mask(9, device), "tgt_is_causal": True}
    if masks.get("padding"):
        hidden = torch.arange(7, device=device) >= torch.tensor([[7], [4]], device=device)
        given = {"memory_key_padding_mask": hidden}
    results = []
    for _ in range(2):
        out = layer(x, memory, **given)
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, memory, *layer.parameters()])])
        if len(results) == 1:
            calls = counted(monkeypatch)
    assert len(calls) == 2
    for stock, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_in_the_place_of_pytorchs_own_inside_transformers(name, device, monkeypatch):
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    if name == "gpt2":
        config = transformers.GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=2)
    elif name == "llama":
        config = transformers.LlamaConfig(
            **{**small, "num_attention_heads": 4, "num_key_value_heads": 2}, intermediate_size=48
        )
    else:
        config = transformers.BertConfig(**small, intermediate_size=48)
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config).to(device).eval()
    ids = torch.randint(0, 40, (2, 11), generator=torch.Generator().manual_seed(0)).to(device)
    mask = (torch.arange(11) < torch.tensor([[11], [6]])).long().to(device)
    results = []
    for _ in range(2):
        out = model(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]
        results.append([out, *torch.autograd.grad(out.square().sum(), list(model.parameters()), allow_unused=True)])
        if len(results) == 1:
            calls = counted(monkeypatch)
    assert len(calls) == 2
    for stock, ours in zip(*results, strict=True):
        assert (stock is None) == (ours is None)
        if stock is not None:
            torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)
