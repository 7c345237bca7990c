"""Every public operator as a uniform function of leaves, for what holds of all of them: numbers, repeats, host cost."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastformer as ff
from fastformer.ops.random import dropout

Result = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Subject:
    """An operator on fixed shapes.

    Attributes:
        operator: leaves → result or results, through the public function.
        reference: the same through PyTorch's operators; with dropout from the same seed.
        shapes: of the leaves.
        differentiable: whether the leaves take gradients.
        scales: factor of each leaf's normal values; () for 1 each.
        random: whether the reference draws the kernels' mask, which reads the seed on the host.
    """

    operator: Callable[..., Result]
    reference: Callable[..., Result]
    shapes: tuple[tuple[int, ...], ...]
    differentiable: bool = True
    scales: tuple[float, ...] = ()
    random: bool = False

    def ours(self, *leaves: Tensor) -> Tensor:
        return joined(self.operator(*leaves))

    def stock(self, *leaves: Tensor) -> Tensor:
        return joined(self.reference(*leaves))

    def draw(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        scales = self.scales or (1.0,) * len(self.shapes)
        values = [
            torch.randn(shape, generator=generator).mul_(scale).to(device, dtype)
            for shape, scale in zip(self.shapes, scales, strict=True)
        ]
        return [value.requires_grad_(self.differentiable) for value in values]


def joined(result: Result) -> Tensor:
    """Several results as one flat tensor, in the widest of their dtypes; one as it is."""
    if isinstance(result, Tensor):
        return result
    return torch.cat([part.flatten() for part in result])


def with_gradients(function: Callable[..., Tensor], leaves: list[Tensor], seed: int = 1) -> list[Tensor]:
    """[output, gradients of every leaf that takes one], the output's gradient drawn from `seed`."""
    out = function(*leaves)
    if not out.requires_grad:
        return [out]
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.randn(out.shape, generator=generator).to(out.device, out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, gradient)]


def subjects(tiny: bool, device: torch.device) -> dict[str, Subject]:
    """By name; sizes of a few tiles and odd if `tiny`, of a real layer otherwise."""
    return _attention(tiny, device) | _rows(tiny, device) | _tables(tiny, device) | _losses(tiny, device)


def _attention(tiny: bool, device: torch.device) -> dict[str, Subject]:
    batch, heads, length, head_dim = (2, 2, 37, 16) if tiny else (4, 12, 413, 64)
    dense = ((batch, heads, length, head_dim),) * 3
    lengths = torch.tensor([0, 1, 16, 19] if tiny else [0, 1, 128, 413, 77, 512], dtype=torch.int32)
    bounds = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).int()]).to(device)
    total, longest, cuts = int(lengths.sum()), int(lengths.max()), lengths.tolist()
    seen = torch.arange(length) < torch.tensor([length, length // 3] * (batch // 2))[:, None, None, None]
    hidden = torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf).to(device)
    seen = seen.to(device)
    few = ((batch, heads, length, head_dim), *((batch, heads // 2, length, head_dim),) * 2)

    def causal(q: Tensor, k: Tensor, v: Tensor) -> Result:
        return ff.ops.scaled_dot_product_attention(q, k, v, is_causal=True)

    def stock_causal(q: Tensor, k: Tensor, v: Tensor) -> Result:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Result:
        return ff.ops.scaled_dot_product_attention(q, k, v, seen)

    def stock_masked(q: Tensor, k: Tensor, v: Tensor) -> Result:
        return F.scaled_dot_product_attention(q, k, v, hidden.to(q.dtype))

    def grouped(q: Tensor, k: Tensor, v: Tensor) -> Result:
        return ff.ops.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def stock_grouped(q: Tensor, k: Tensor, v: Tensor) -> Result:
        k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def varlen(q: Tensor, k: Tensor, v: Tensor) -> Result:
        return ff.ops.attention_varlen(q, k, v, bounds, bounds, longest, longest)

    def stock_varlen(q: Tensor, k: Tensor, v: Tensor) -> Result:
        parts = zip(*(t.split(cuts) for t in (q, k, v)), strict=True)
        outs = [
            F.scaled_dot_product_attention(*(t.transpose(0, 1)[None] for t in part))[0].transpose(0, 1)
            for part in parts
            if part[0].shape[0]
        ]
        return torch.cat(outs)

    def wide(q: Tensor, k: Tensor, v: Tensor) -> Result:
        return ff.ops.scaled_dot_product_attention(q, k, v, is_causal=True, causal_alignment="bottom-right")

    def maps(q: Tensor, k: Tensor, v: Tensor) -> Result:
        out, lse = ff.ops.scaled_dot_product_attention(q, k, v, is_causal=True, return_lse=True)
        return out, ff.ops.attention_weights(q, k, lse, is_causal=True).to(out.dtype)

    def stock_maps(q: Tensor, k: Tensor, v: Tensor) -> Result:
        ahead = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
        weights = (q @ k.mT * head_dim**-0.5).masked_fill(ahead, -torch.inf).softmax(-1)
        return weights @ v, weights.mean(1)

    cached_lengths = torch.tensor([length, length // 3] * (batch // 2), dtype=torch.int32, device=device)

    def cached(q: Tensor, keys: Tensor, values: Tensor) -> Result:
        return ff.ops.attention_kv_cache(q, keys, values, cached_lengths)

    def stock_cached(q: Tensor, keys: Tensor, values: Tensor) -> Result:
        mask = (torch.arange(length, device=q.device) < cached_lengths[:, None])[:, None, None, :]
        q, keys, values = (t.transpose(1, 2) for t in (q, keys, values))
        keys, values = (t.repeat_interleave(2, 1) for t in (keys, values))
        return F.scaled_dot_product_attention(q, keys, values, mask).transpose(1, 2)

    def merged(a: Tensor, lse_a: Tensor, b: Tensor, lse_b: Tensor) -> Result:
        return ff.ops.merge_attention(a, lse_a.float(), b, lse_b.float())[0]

    def stock_merged(a: Tensor, lse_a: Tensor, b: Tensor, lse_b: Tensor) -> Result:
        share = (
            torch.stack((lse_a.float(), lse_b.float()))
            .softmax(0)[..., None]
            .to(torch.promote_types(a.dtype, torch.float32))
        )
        return (a * share[0] + b * share[1]).to(a.dtype)

    cache = ((batch, 1, heads, head_dim), *((batch, length, heads // 2, head_dim),) * 2)
    parts = ((batch, heads, length, head_dim), (batch, heads, length))
    return {
        "attention_kv_cache": Subject(cached, stock_cached, cache, differentiable=False),
        "merge_attention": Subject(merged, stock_merged, (*parts, *parts)),
        "attention": Subject(ff.ops.scaled_dot_product_attention, F.scaled_dot_product_attention, dense),
        "attention causal": Subject(causal, stock_causal, dense),
        "attention masked": Subject(masked, stock_masked, dense),
        "attention grouped": Subject(grouped, stock_grouped, few),
        "attention biased": Subject(
            ff.ops.scaled_dot_product_attention,
            F.scaled_dot_product_attention,
            (*dense, (1, heads, length, length)),
        ),
        "attention wide": Subject(wide, stock_causal, ((batch, heads, length, 16 if tiny else 320),) * 3),
        "attention_weights": Subject(maps, stock_maps, dense),
        "attention_varlen": Subject(varlen, stock_varlen, ((total, heads, head_dim),) * 3),
    }


def _rows(tiny: bool, device: torch.device) -> dict[str, Subject]:
    rows, n = (19, 48) if tiny else (1031, 768)
    x, vector = (rows, n), (n,)
    seed, p = torch.tensor([0x5EED], device=device), 0.1
    drop: dict[str, Any] = {"dropout_p": p, "dropout_seed": seed}
    scale = torch.arange(rows, device=device).remainder(3).float()

    def add_rms(x: Tensor, residual: Tensor, weight: Tensor) -> Result:
        options: dict[str, Any] = {"offset": 1.0, "return_residual": True, "row_scale": scale}
        return ff.ops.add_rms_norm(x, residual, weight, 1e-6, **options)

    def stock_add_rms(x: Tensor, residual: Tensor, weight: Tensor) -> Result:
        total = residual + x * scale[:, None].to(x.dtype)
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(total.to(wide), (n,), weight.to(wide) + 1.0, 1e-6).to(x.dtype), total

    def rms(x: Tensor, weight: Tensor) -> Result:
        return ff.ops.rms_norm(x, weight, 1e-6)

    def dropped(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Result:
        return ff.ops.add_layer_norm(x, residual, weight, bias, return_residual=True, **drop)

    def stock_dropped(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Result:
        total = residual + dropout(x, p, seed)
        return F.layer_norm(total, (n,), weight, bias), total

    def bias_dropout_add(x: Tensor, bias: Tensor, residual: Tensor) -> Result:
        return ff.ops.bias_dropout_add(x, bias, residual, **drop)

    row_pair, affine = (x, x), (vector, vector)
    return {
        "layer_norm": Subject(ff.ops.layer_norm, lambda x, w, b: F.layer_norm(x, (n,), w, b), (x, *affine)),
        "rms_norm": Subject(rms, lambda x, w: F.rms_norm(x, (n,), w, 1e-6), (x, vector)),
        "add_layer_norm": Subject(
            ff.ops.add_layer_norm, lambda x, r, w, b: F.layer_norm(x + r, (n,), w, b), (*row_pair, *affine)
        ),
        "add_layer_norm dropout": Subject(dropped, stock_dropped, (*row_pair, *affine), random=True),
        "add_rms_norm": Subject(add_rms, stock_add_rms, (*row_pair, vector)),
        "bias_gelu": Subject(ff.ops.bias_gelu, lambda x, b: F.gelu(x + b), (x, vector)),
        "geglu": Subject(ff.ops.geglu, lambda gate, up: F.gelu(gate) * up, row_pair),
        "swiglu": Subject(ff.ops.swiglu, lambda gate, up: F.silu(gate) * up, row_pair),
        "relu_squared": Subject(ff.ops.relu_squared, lambda x: F.relu(x).square(), (x,)),
        "bias_dropout_add": Subject(
            bias_dropout_add, lambda x, b, r: r + dropout(x + b, p, seed), (x, vector, x), random=True
        ),
    }


def _tables(tiny: bool, device: torch.device) -> dict[str, Subject]:
    batch, length, n, words = (2, 11, 48, 23) if tiny else (8, 129, 768, 3001)
    heads, width = (2, 16) if tiny else (12, 64)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, words, (batch, length), generator=generator).to(device)
    kinds = torch.randint(0, 2, (batch, length), generator=generator).to(device)
    angle = torch.arange(length)[:, None] * 10000.0 ** -(torch.arange(width // 2) / (width // 2))
    cos, sin = angle.cos().to(device), angle.sin().to(device)
    cuts = [0, 3, length, batch * length - 1]
    bounds = torch.tensor(cuts, dtype=torch.int32, device=device)

    def embed(word: Tensor, place: Tensor, kind: Tensor, weight: Tensor, bias: Tensor) -> Result:
        return ff.ops.embedding_layer_norm(ids, word, place, kind, weight, bias, token_type_ids=kinds)

    def stock_embed(word: Tensor, place: Tensor, kind: Tensor, weight: Tensor, bias: Tensor) -> Result:
        total = F.embedding(ids, word) + F.embedding(kinds, kind) + place
        return F.layer_norm(total, (n,), weight, bias, 1e-12)

    def rotate(query: Tensor, key: Tensor) -> Result:
        q, k = ff.ops.rotary_embedding(query, key, cos, sin)
        assert k is not None
        return q, k

    def stock_rotate(query: Tensor, key: Tensor) -> Result:
        c, s = (torch.cat((t, t), -1)[:, None] for t in (cos, sin))
        wide = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (query, key))
        halves = ((t, torch.cat((-t[..., width // 2 :], t[..., : width // 2]), -1)) for t in wide)
        return tuple((t * c + half * s).to(query.dtype) for t, half in halves)

    def pool(x: Tensor) -> Result:
        return ff.ops.pool_packed(x, bounds)

    def stock_pool(x: Tensor) -> Result:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return torch.stack([wide[a:b].mean(0) for a, b in itertools.pairwise(cuts)]).to(x.dtype)

    tables = ((words, n), (length, n), (2, n), (n,), (n,))
    return {
        "embedding_layer_norm": Subject(embed, stock_embed, tables),
        "rotary_embedding": Subject(rotate, stock_rotate, ((batch, length, heads, width), (batch, length, 2, width))),
        "pool_packed": Subject(pool, stock_pool, ((batch * length, n),)),
    }


def _losses(tiny: bool, device: torch.device) -> dict[str, Subject]:
    rows, n, classes = (13, 24, 301) if tiny else (517, 768, 5003)
    target = torch.randint(0, classes, (rows,), generator=torch.Generator().manual_seed(0))
    target[::5] = -100
    target = target.to(device)

    def loss(logits: Tensor) -> Result:
        return ff.ops.cross_entropy(logits, target, label_smoothing=0.1)

    def linear_loss(x: Tensor, weight: Tensor, bias: Tensor) -> Result:
        return ff.ops.linear_cross_entropy(x, weight, target, bias)

    def stock_linear_loss(x: Tensor, weight: Tensor, bias: Tensor) -> Result:
        return F.cross_entropy(F.linear(x, weight, bias), target)

    return {
        "cross_entropy": Subject(
            loss, lambda logits: F.cross_entropy(logits, target, label_smoothing=0.1), ((rows, classes),)
        ),
        "linear_cross_entropy": Subject(
            linear_loss, stock_linear_loss, ((rows, n), (classes, n), (classes,)), scales=(1.0, n**-0.5, 1.0)
        ),
    }


NAMES = tuple(subjects(True, torch.device("cpu")))
