"""What people do with modules besides calling them: ours and patched ones, against stock."""

import copy
import io
import pickle

import pytest
import torch
from nn_pairs import assert_same, pair, shake
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import fastformer as ff
import fastformer.nn as fnn

B, S, T, E, H = 3, 7, 5, 16, 2
OPTIONS = {"dim_feedforward": 24, "dropout": 0.0, "batch_first": True}
SRC = torch.arange(S) >= torch.tensor([7, 3, 5])[:, None]
TGT = torch.arange(T) >= torch.tensor([2, 5, 4])[:, None]


def batch():
    torch.manual_seed(5)
    return torch.randn(B, S, E), torch.randn(B, T, E)


def call(model, src, tgt):
    causal = torch.nn.Transformer.generate_square_subsequent_mask(tgt.shape[1])
    masks = {"src_key_padding_mask": SRC, "tgt_key_padding_mask": TGT, "memory_key_padding_mask": SRC}
    return model(src, tgt, tgt_mask=causal, tgt_is_causal=True, **masks)


def models(patched, **options):
    stock, ours = pair(torch.nn.Transformer, fnn.Transformer, E, H, 1, 1, **{**OPTIONS, **options})
    if patched:
        ours = copy.deepcopy(stock)
        ff.patch(ours)
    return stock, ours


both = pytest.mark.parametrize("patched", [True, False], ids=["patched", "ours"])


@both
def test_copies_pickles_and_checkpoints_both_ways(patched):
    stock, ours = models(patched)
    want = call(ours, *batch())
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    twins = [copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(buffer, weights_only=False)]
    for twin in twins:
        fnn.reset_count()
        assert torch.equal(call(twin, *batch()), want)
        assert fnn.count().fused["MultiheadAttention"] == 3
        assert not fnn.count().fallback
    other, again = models(patched)
    for source, target in ((stock, again), (ours, other)):
        buffer = io.BytesIO()
        torch.save(source.state_dict(), buffer)
        buffer.seek(0)
        shake(target)
        assert not any(target.load_state_dict(torch.load(buffer, weights_only=True)))
        torch.testing.assert_close(call(target, *batch())[~TGT], want[~TGT], rtol=1e-5, atol=1e-5)


def test_patch_and_back_leave_nothing():
    stock, _ = models(False)
    model = copy.deepcopy(stock)
    before = [(type(m), set(m.__dict__)) for m in model.modules()]
    report = ff.patch(model)
    names = [what for _, what in report.replaced]
    # The stacks, two layers, three attentions; a norm for each of them and each stack.
    assert len(names) == 1 + 2 + 2 + 3 + (2 + 3 + 2)
    assert report.unpad.startswith("removed")
    again = ff.patch(model)
    assert again.replaced == report.replaced
    assert ff.unpatch(model) == len(names)
    assert [(type(m), set(m.__dict__)) for m in model.modules()] == before
    assert torch.equal(call(model, *batch()), call(stock, *batch()))


@both
def test_hooks_see_what_stock_shows(patched):
    stock, ours = models(patched)
    shapes = {0: [], 1: []}
    for number, model in enumerate((stock, ours)):
        for name, module in model.named_modules():
            # Stock reads the output projection and never calls it; nor do we.
            module.register_forward_hook(
                lambda m, a, out, name=name, n=number: shapes[n].append(
                    (name, (out[0] if isinstance(out, tuple) else out).shape)
                )
            )
    assert_same(stock, ours, list(batch()), call, ~TGT)
    assert shapes[0] == shapes[1]


@both
def test_parametrized_weights(patched):
    stock, ours = models(patched)
    for model in (stock, ours):
        layer = model.encoder.layers[0]
        parametrizations.weight_norm(layer.linear1)
        parametrizations.weight_norm(layer.self_attn, "in_proj_weight")
    assert_same(stock, ours, list(batch()), call, ~TGT)


@both
def test_tied_weights(patched):
    stock, ours = models(patched)
    for model in (stock, ours):
        model.decoder.layers[0].linear1.weight = model.encoder.layers[0].linear1.weight
        model.decoder.layers[0].norm1 = model.encoder.layers[0].norm1
    assert len(list(ours.parameters())) == len(list(stock.parameters()))
    assert_same(stock, ours, list(batch()), call, ~TGT)


@both
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(patched, reentrant):
    stock, ours = models(patched, dropout=0.3)

    class Checkpointed(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, src, tgt):
            return checkpoint(lambda a, b: call(self.inner, a, b), src, tgt, use_reentrant=reentrant)

    grads = []
    for model in (lambda s, t: call(ours, s, t), Checkpointed(ours)):
        src, tgt = (t.requires_grad_() for t in batch())
        ours.zero_grad()
        torch.manual_seed(1)
        model(src, tgt).square().sum().backward()
        grads.append([src.grad, *(p.grad for p in ours.parameters())])
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)
    del stock


def test_checkpoint_wrapper_around_layers_keeps_padding_away():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    stock, ours = models(False)
    for layers in (ours.encoder.layers, ours.decoder.layers):
        layers[0] = checkpoint_wrapper(layers[0])
    fnn.reset_count()
    src, tgt = batch()
    torch.testing.assert_close(call(ours, src, tgt)[~TGT], call(stock, src, tgt)[~TGT], rtol=1e-5, atol=1e-5)
    assert not fnn.count().fallback


@both
@pytest.mark.parametrize("norm_first", [True, False])
def test_autocast_and_grad_scaler(patched, norm_first):
    stock, ours = models(patched, norm_first=norm_first)
    outs, grads = [], []
    for model in (stock, ours):
        src, tgt = batch()
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with torch.autocast("cpu", torch.bfloat16):
            out = call(model, src, tgt)
            loss = out[~TGT].float().square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        scaler.step(optimizer)
        outs.append(out)
    assert outs[0].dtype == outs[1].dtype
    exact = call(stock.double(), *(t.double() for t in batch()))[~TGT]
    assert exact.shape == outs[0][~TGT].shape
    assert (outs[0][~TGT] - outs[1][~TGT]).abs().max() < 0.1
    assert (grads[0] - grads[1]).norm() < 0.05 * grads[0].norm()


def test_autocast_error_is_no_larger_than_stocks():
    stock, ours = models(False)
    exact = call(copy.deepcopy(stock).double(), *(t.double() for t in batch()))[~TGT]
    with torch.autocast("cpu", torch.bfloat16):
        errors = [(call(m, *batch())[~TGT].double() - exact).norm() for m in (stock, ours)]
    assert errors[1] <= 2 * errors[0]


@both
def test_functional_call_and_ema(patched):
    stock, ours = models(patched)
    moved = {name: p.detach() + 0.1 for name, p in stock.named_parameters()}
    src, tgt = batch()
    causal = torch.nn.Transformer.generate_square_subsequent_mask(T)
    outs = [torch.func.functional_call(m, moved, (src, tgt), {"tgt_mask": causal}) for m in (stock, ours)]
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-5, atol=1e-5)
    average = torch.optim.swa_utils.AveragedModel(ours, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    average.update_parameters(ours)
    shake(ours)
    average.update_parameters(ours)
    want = [(0.5 * a + 0.5 * b) for a, b in zip(stock.parameters(), ours.parameters(), strict=True)]
    for got, mean in zip(average.module.parameters(), want, strict=True):
        torch.testing.assert_close(got, mean)
    fnn.reset_count()
    call(average.module.eval(), *batch())
    assert not fnn.count().fallback


def test_per_sample_gradients():
    stock, ours = pair(torch.nn.TransformerEncoderLayer, fnn.TransformerEncoderLayer, E, H, **OPTIONS)
    src, _ = batch()

    def grads(model):
        names = dict(model.named_parameters())

        def loss(parameters, x):
            return torch.func.functional_call(model, parameters, (x[None],)).square().sum()

        return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))({k: v.detach() for k, v in names.items()}, src)

    a, b = grads(stock), grads(ours)
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("patched", "norm_first"), [(True, True), (False, False)], ids=["patched", "ours"])
def test_compile_without_graph_breaks(patched, norm_first):
    stock, ours = models(patched, norm_first=norm_first)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    # Under compile the padding stays: the number of tokens is data.
    assert_same(stock, ours, list(batch()), lambda m, s, t: call(compiled if m is ours else m, s, t), ~TGT)


@both
def test_export(patched):
    stock, ours = models(patched)
    src, tgt = batch()
    causal = torch.nn.Transformer.generate_square_subsequent_mask(T)
    kwargs = {"tgt_mask": causal, "src_key_padding_mask": SRC, "memory_key_padding_mask": SRC, "tgt_is_causal": True}
    program = torch.export.export(ours.eval(), (src, tgt), kwargs)
    want = stock.train()(src, tgt, **kwargs)
    torch.testing.assert_close(program.module()(src, tgt, **kwargs), want, rtol=1e-5, atol=1e-5)


@both
def test_quantized_by_torchao(patched):
    quantization = pytest.importorskip("torchao.quantization")
    stock, ours = models(patched)
    for model in (stock, ours):
        quantization.quantize_(model.eval(), quantization.Int8WeightOnlyConfig())
    with torch.no_grad():
        a, b = (call(m.train(), *batch())[~TGT] for m in (stock, ours))
    torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-3)


def test_bfloat16_and_meta_device():
    ours = fnn.Transformer(E, H, 1, 1, **OPTIONS, device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in ours.parameters())


def test_patch_of_a_model_of_ones_own():
    """Attention and norms used outside of torch.nn's layers, and back."""

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.RMSNorm(E)
            self.attention = torch.nn.MultiheadAttention(E, H, batch_first=True)
            self.last = torch.nn.LayerNorm(E)

        def forward(self, x):
            n = self.norm(x)
            return self.last(x + self.attention(n, n, n, need_weights=False)[0])

    stock = Block()
    shake(stock)
    model = copy.deepcopy(stock)
    assert [path for path, _ in ff.patch(model).replaced] == ["norm", "attention", "last"]
    fnn.reset_count()
    assert_same(stock, model, [batch()[0]], lambda m, x: m(x))
    assert fnn.count().fused == {"RMSNorm": 1, "MultiheadAttention": 1, "LayerNorm": 1}
    assert ff.unpatch(model) == 3
    assert [type(m) for m in model.modules()] == [type(m) for m in stock.modules()]


def test_subclasses_of_ones_own_are_reported_and_left_alone():
    class OwnAttention(torch.nn.MultiheadAttention):
        def forward(self, *args, **kwargs):
            out, weights = super().forward(*args, **kwargs)
            return 2 * out, weights

    stock = torch.nn.TransformerEncoderLayer(E, H, **OPTIONS)
    stock.self_attn = OwnAttention(E, H, batch_first=True)
    model = copy.deepcopy(stock)
    report = ff.patch(model)
    assert ("self_attn", "OwnAttention derives from MultiheadAttention and may compute otherwise") in report.skipped
    assert "OwnAttention derives from" in str(report)
    assert_same(stock, model, [batch()[0]], lambda m, x: m(x))
    assert not ff.patch(fnn.TransformerEncoderLayer(E, H, **OPTIONS)).skipped


@pytest.mark.slow  # the C++ compiler takes most of a minute
def test_encoder_compiled_by_inductor():
    stock, ours = pair(
        torch.nn.TransformerEncoder,
        fnn.TransformerEncoder,
        torch.nn.TransformerEncoderLayer(E, H, **OPTIONS),
        1,
        enable_nested_tensor=False,
    )
    compiled = torch.compile(ours, fullgraph=True)
    mask = {"src_key_padding_mask": SRC}
    assert_same(stock, ours, [batch()[0]], lambda m, x: (compiled if m is ours else m)(x, **mask), ~SRC)
