"""Seeded differential fuzz: torch.nn's modules against ours over the cross product of their arguments.

A case is its number. Outputs, weights and all gradients have to agree, in fp32 as closely with fp64 as stock does, and
so has the exception of a call that stock refuses. `--slow` runs all; without it a fixed slice runs.
"""

import random

import pytest
import torch
import torch.nn.functional as F
from nn_pairs import assert_same, shake

import fastformer.nn as fnn

CASES = 1600
SLICE = 4
SPOILS = (
    "features",
    "dimensions",
    "batch",
    "padding dtype",
    "padding shape",
    "mask dtype",
    "mask shape",
    "mask dimensions",
    "hint without mask",
)
BATCHES = 40  # cases run in this many tests


def twins(name, args, kwargs):
    torch.manual_seed(0)
    stock = getattr(torch.nn, name)(*args, **kwargs)
    shake(stock, 0.1)
    ours = getattr(fnn, name)(*args, **kwargs)
    ours.load_state_dict(stock.state_dict())
    return stock, ours


class Draw:
    """The choices of one case, in another dtype than its own if `dtype` says so."""

    def __init__(self, number, dtype=None):
        self.rng = random.Random(number)
        self.generator = torch.Generator().manual_seed(number)
        self.dtype = self.of(torch.float32, torch.float64, torch.float64)
        self.dtype = dtype or self.dtype
        # What is wrong with the call, if anything is; stock decides whether it is.
        self.spoiled = self.of(*SPOILS) if self.chance(0.15) else ""

    def of(self, *choices):
        return self.rng.choice(choices)

    def chance(self, p):
        return self.rng.random() < p

    def tensor(self, *shape):
        return torch.randn(*shape, generator=self.generator).to(self.dtype)  # the same numbers in every dtype

    def input(self, *shape):
        """A module's input: one feature, token or dimension too many if that is what is spoiled."""
        if self.spoiled == "features":
            shape = (*shape[:-1], shape[-1] + 1)
        if self.spoiled == "dimensions":
            shape = (1, *shape)
        if self.spoiled == "batch" and self.chance(0.5):
            shape = (shape[0] + 1, *shape[1:])
        return self.tensor(*shape)

    def padding(self, batch, seqlen, kind):
        """None, or [batch, seqlen]; no row is padded entirely."""
        if kind == "none":
            return None
        if self.spoiled == "padding dtype":
            return torch.zeros(batch, seqlen, dtype=torch.int64)
        if self.spoiled == "padding shape":
            return torch.zeros(batch, seqlen + 1, dtype=torch.bool)
        if kind == "whole":
            return torch.zeros(batch, seqlen, dtype=torch.bool)
        mask = torch.zeros(batch, seqlen, dtype=torch.bool)
        for row in range(batch):
            length = self.rng.randint(1, seqlen)
            if kind == "left":
                mask[row, : seqlen - length] = True
            elif kind == "holes":
                mask[row] = torch.rand(seqlen, generator=self.generator) < 0.5
                mask[row, self.rng.randrange(seqlen)] = False
            else:
                mask[row, length:] = True
        if kind == "float":
            return torch.zeros(batch, seqlen, dtype=self.dtype).masked_fill(mask, float("-inf"))
        if kind == "bias":
            return self.tensor(batch, seqlen)
        return mask

    def attention_mask(self, rows, seqlen_q, seqlen_k, kind):
        """None, 2-D or 3-D; every row may attend to its own place or the first key."""
        if kind == "none":
            return None
        if self.spoiled == "mask dtype":
            return torch.zeros(seqlen_q, seqlen_k, dtype=torch.int64)
        if self.spoiled == "mask shape":
            return torch.zeros(seqlen_q + 1, seqlen_k, dtype=torch.bool)
        if self.spoiled == "mask dimensions":
            return torch.zeros(1, 1, seqlen_q, seqlen_k, dtype=torch.bool)
        if kind in ("causal", "causal float", "made"):
            if seqlen_q != seqlen_k:
                return None
            if kind == "made":
                return fnn.generate_square_subsequent_mask(seqlen_q, dtype=self.dtype)
            mask = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool).triu(1)
            return mask if kind == "causal" else torch.zeros(mask.shape, dtype=self.dtype).masked_fill(mask, -torch.inf)
        shape = (rows, seqlen_q, seqlen_k) if kind.endswith("3") else (seqlen_q, seqlen_k)
        if kind.startswith("float"):
            return self.tensor(*shape)
        mask = torch.rand(*shape, generator=self.generator) < 0.3
        mask[..., 0] = False
        return mask


MASKS = ("none", "causal", "causal float", "made", "bool", "bool3", "float", "float3")
PADDINGS = ("none", "right", "left", "holes", "whole", "float", "bias")


def attention(draw):
    heads, batch, sq = draw.of(1, 2, 3), draw.of(1, 2, 3), draw.of(1, 2, 5)
    embed = heads * draw.of(1, 4, 5)
    kind = draw.of("self", "self", "kv", "all")
    sk = sq if kind == "self" else draw.of(1, 3, 5)
    options = {
        "bias": draw.chance(0.7),
        "add_bias_kv": draw.chance(0.2),
        "add_zero_attn": draw.chance(0.2),
        "batch_first": draw.chance(0.5),
        "dtype": draw.dtype,
    }
    if kind == "all" and draw.chance(0.5):
        options |= {"kdim": draw.of(3, 6), "vdim": draw.of(2, embed)}
    stock, ours = twins("MultiheadAttention", (embed, heads), options)
    batched = draw.chance(0.75)
    rows = batch if batched else 1

    def shape(seqlen, size):
        if not batched:
            return seqlen, size
        return (batch, seqlen, size) if options["batch_first"] else (seqlen, batch, size)

    count = {"self": 1, "kv": 2, "all": 3}[kind]
    sizes = ((sq, embed), (sk, stock.kdim), (sk, stock.vdim))[:count]
    inputs = [draw.input(*shape(*size)) for size in sizes]
    mask = draw.attention_mask(rows * heads, sq, sk, draw.of(*MASKS))
    padding = draw.padding(rows, sk, draw.of(*PADDINGS))
    trained = mask is not None and mask.is_floating_point() and draw.chance(0.5) and bool(torch.isfinite(mask).all())
    causal = hint(draw, mask)
    if padding is not None and not batched:
        padding = padding[0]
    weights, average = draw.chance(0.4), draw.chance(0.5)
    train = draw.chance(0.7)
    stock.train(train)
    ours.train(train)

    def call(m, *tensors):
        q, k, v = (*tensors[:count], *tensors[count - 1 : count] * (3 - count))
        own = tensors[count] if trained else mask
        out, w = m(q, k, v, padding, weights, own, average, causal)
        # One tensor of both, so that weights get a gradient too.
        return torch.cat((out.flatten(), w.flatten())) if weights else out

    return stock, ours, [*inputs, mask] if trained else inputs, call, None


def causal_like(mask):
    return torch.nn.Transformer.generate_square_subsequent_mask(mask.shape[0], dtype=mask.dtype)


def layer_options(draw, heads):
    return (heads * draw.of(4, 8), heads), {
        "dim_feedforward": draw.of(3, 8),
        "dropout": 0.0,
        "activation": draw.of("relu", "gelu", F.silu, torch.nn.GELU(), torch.nn.GELU("tanh"), torch.nn.ReLU()),
        "layer_norm_eps": draw.of(1e-5, 1e-2),
        "batch_first": draw.chance(0.5),
        "norm_first": draw.chance(0.5),
        "bias": draw.chance(0.7),
        "dtype": draw.dtype,
    }


def place(batch_first, batch, seqlen, size):
    if not batch:
        return seqlen, size
    return (batch, seqlen, size) if batch_first else (seqlen, batch, size)


def hint(draw, mask):
    if mask is None:
        return draw.spoiled == "hint without mask"
    if mask.dtype == torch.int64 or mask.ndim != 2 or mask.shape[0] != mask.shape[1]:
        return False
    return torch.equal(mask, causal_like(mask)) and draw.chance(0.5)


def encoder_layer(draw):
    return encoder(draw, stack=False)


def encoder(draw, stack=True):
    heads, batch, s = draw.of(1, 2), draw.of(0, 1, 3), draw.of(1, 4, 6)
    args, options = layer_options(draw, heads)
    if stack:
        torch.manual_seed(0)
        layer = torch.nn.TransformerEncoderLayer(*args, **options)
        norm = draw.of(None, torch.nn.LayerNorm(args[0], dtype=draw.dtype))
        stock, ours = twins("TransformerEncoder", (layer, 2, norm), {"enable_nested_tensor": False})
        unpads = draw.chance(0.7)
        ours.fastformer_unpad = unpads
    else:
        stock, ours = twins("TransformerEncoderLayer", args, options)
        unpads = False
    mask = draw.attention_mask(max(1, batch) * heads, s, s, draw.of(*MASKS))
    padding = draw.padding(max(1, batch), s, draw.of(*PADDINGS))
    seen = None
    if batch and unpads and padding is not None and padding.dtype == torch.bool:
        seen = ~padding if options["batch_first"] else ~padding.T
    if padding is not None and not batch:
        padding = padding[0]
    causal = hint(draw, mask)
    name = "mask" if stack else "src_mask"
    x = draw.input(*place(options["batch_first"], batch, s, args[0]))
    return (
        stock,
        ours,
        [x],
        lambda m, x: m(x, **{name: mask}, src_key_padding_mask=padding, is_causal=causal),
        seen,
    )


def decoder_layer(draw):
    return decoder(draw, stack=False)


def decoder(draw, stack=True):
    heads, batch, t, s = draw.of(1, 2), draw.of(0, 1, 3), draw.of(1, 4, 6), draw.of(1, 5)
    args, options = layer_options(draw, heads)
    if stack:
        torch.manual_seed(0)
        layer = torch.nn.TransformerDecoderLayer(*args, **options)
        norm = draw.of(None, torch.nn.LayerNorm(args[0], dtype=draw.dtype))
        stock, ours = twins("TransformerDecoder", (layer, 2, norm), {})
        unpads = draw.chance(0.7)
        ours.fastformer_unpad = unpads
    else:
        stock, ours = twins("TransformerDecoderLayer", args, options)
        unpads = False
    rows = max(1, batch) * heads
    tgt_mask = draw.attention_mask(rows, t, t, draw.of("none", "causal", "made", "causal float", "bool3", "float"))
    memory_mask = draw.attention_mask(rows, t, s, draw.of("none", "none", "none", "bool", "float3"))
    tgt_padding = draw.padding(max(1, batch), t, draw.of("none", "right", "left", "holes", "whole", "float"))
    memory_padding = draw.padding(max(1, batch), s, draw.of("none", "right", "left", "holes", "whole", "float"))
    seen = None
    if batch and unpads and tgt_padding is not None and tgt_padding.dtype == torch.bool:
        seen = ~tgt_padding if options["batch_first"] else ~tgt_padding.T
    if not batch:
        tgt_padding, memory_padding = (None if p is None else p[0] for p in (tgt_padding, memory_padding))
    causal = hint(draw, tgt_mask)
    inputs = [draw.input(*place(options["batch_first"], batch, n, args[0])) for n in (t, s)]
    return (
        stock,
        ours,
        inputs,
        lambda m, tgt, memory: m(tgt, memory, tgt_mask, memory_mask, tgt_padding, memory_padding, tgt_is_causal=causal),
        seen,
    )


def transformer(draw):
    heads, batch, t, s = draw.of(1, 2), draw.of(0, 2, 3), draw.of(1, 4), draw.of(1, 5)
    args, options = layer_options(draw, heads)
    stock, ours = twins("Transformer", (*args, 1, 2), options)
    ours.fastformer_unpad = unpads = draw.chance(0.7)
    rows = max(1, batch) * heads
    src_mask = draw.attention_mask(rows, s, s, draw.of("none", "none", "causal", "bool"))
    tgt_mask = draw.attention_mask(rows, t, t, draw.of("none", "causal", "made", "bool"))
    tgt_padding = draw.padding(max(1, batch), t, draw.of("none", "right", "holes", "float"))
    src_padding = draw.padding(max(1, batch), s, draw.of("none", "right", "left", "holes", "float"))
    same = draw.chance(0.6)
    if not batch:
        tgt_padding, src_padding = (None if p is None else p[0] for p in (tgt_padding, src_padding))
    memory_padding = src_padding if same else None if draw.chance(0.5) else draw.padding(1, s, "none")
    seen = None
    if batch and unpads and tgt_padding is not None and tgt_padding.dtype == torch.bool:
        seen = ~tgt_padding if options["batch_first"] else ~tgt_padding.T
    inputs = [draw.input(*place(options["batch_first"], batch, n, args[0])) for n in (s, t)]
    return (
        stock,
        ours,
        inputs,
        lambda m, src, tgt: m(
            src,
            tgt,
            src_mask,
            tgt_mask,
            None,
            src_padding,
            tgt_padding,
            memory_padding,
        ),
        seen,
    )


def norm(draw):
    shape = draw.of((5,), (3,), (2, 3), (1,))
    name = draw.of("LayerNorm", "RMSNorm")
    options = {"elementwise_affine": draw.chance(0.7), "dtype": draw.dtype}
    if name == "LayerNorm":
        options |= {"bias": draw.chance(0.5), "eps": draw.of(1e-5, 1e-2)}
    else:
        options |= {"eps": draw.of(None, 1e-5)}
    stock, ours = twins(name, (shape,), options)
    return stock, ours, [draw.input(*draw.of((), (2,), (4, 3)), *shape)], lambda m, x: m(x), None


KINDS = (attention, attention, attention, encoder_layer, decoder_layer, encoder, encoder, decoder, transformer, norm)


def run(number):
    draw = Draw(number)
    stock, ours, inputs, call, seen = KINDS[number % len(KINDS)](draw)
    try:
        with torch.no_grad():
            call(stock, *inputs)
    except Exception as wanted:
        with pytest.raises(type(wanted)):
            call(ours, *inputs)
        return
    exact = None
    if draw.dtype == torch.float32:
        module, _, wide, call_wide, _ = KINDS[number % len(KINDS)](Draw(number, torch.float64))
        module.load_state_dict(stock.state_dict())
        exact = module, wide, call_wide
    assert_same(stock, ours, inputs, call, seen, exact)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("part", range(BATCHES))
def test_same_as_stock(part, request):
    step = 1 if request.config.getoption("--slow") else SLICE
    for number in range(part * step, CASES, BATCHES * step):
        try:
            run(number)
        except Exception as error:
            raise AssertionError(f"case {number} ({KINDS[number % len(KINDS)].__name__})") from error
