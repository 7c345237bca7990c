"""Attention calls through the simulated Hopper kernels, with float64 by the definition beside them."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastformer.kernels.attention import hopper
from fastformer.kernels.attention.call import Call
from tests.gluon_sim import kernel
from tests.ops.attention_oracle import oracle


@dataclass
class Problem:
    """Sizes and rules of one call. `lengths` (pairs of query and key lengths) makes it a packed one."""

    q_len: int = 130
    k_len: int = 200
    head_dim: int = 64
    heads: int = 2
    kv_heads: int = 1
    batch: int = 1
    dtype: torch.dtype = torch.float16
    lengths: list[tuple[int, int]] = field(default_factory=list)
    spare: int = 0  # packed tokens after the last sequence
    rules: dict[str, Any] = field(default_factory=dict)
    layout: str = "tokens first"

    def draw(self, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value inside memory full of NaN."""
        generator = torch.Generator().manual_seed(seed)
        q_len, k_len = (sum(n) for n in zip(*self.lengths, strict=True)) if self.lengths else (self.q_len, self.k_len)
        sizes = [
            (self.heads, q_len + self.spare),
            (self.kv_heads, k_len + self.spare),
            (self.kv_heads, k_len + self.spare),
        ]
        found = []
        for heads, length in sizes:
            shape = (self.batch, heads, length, self.head_dim)
            values = torch.randn(shape, generator=generator).to(self.dtype)
            if self.layout == "plain":
                place = torch.full((*shape,), math.nan, dtype=self.dtype)
            elif self.layout == "fused":
                wide = torch.full((self.batch, length, 3, heads, self.head_dim), math.nan, dtype=self.dtype)
                place = wide[:, :, 1].transpose(1, 2)
            else:
                place = torch.empty(self.batch, length, heads, self.head_dim, dtype=self.dtype).transpose(1, 2)
            place.copy_(values)
            found.append(place[0].transpose(0, 1) if self.lengths else place)
        return found[0], found[1], found[2]

    def call(self, query: Tensor, key: Tensor, value: Tensor) -> Call:
        rules = {"bottom_right": False, "causal": False, "left": -1, "right": -1, "softcap": 0.0, **self.rules}
        scale = rules.pop("scale", 1 / math.sqrt(self.head_dim))
        bounds = [None, None]
        longest = [0, 0]
        if self.lengths:
            for i, lengths in enumerate(zip(*self.lengths, strict=True)):
                bounds[i] = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32).to(
                    query.device
                )
                longest[i] = max(lengths)
        return Call(
            query, key, value, bounds[0], bounds[1], *longest, mask=None, slopes=None, sinks=None, seed=None,
            dropout_p=0.0, threshold=0, scale=scale, **rules,
        )  # fmt: skip

    def expected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """By the definition, in the dtype given; packed: tokens after the last sequence give 0 and -inf."""
        options = {
            "scale": self.rules.get("scale"),
            "softcap": self.rules.get("softcap"),
            "is_causal": self.rules.get("causal", False),
            "causal_alignment": "bottom-right" if self.rules.get("bottom_right") else "top-left",
            "window": (self.rules.get("left", -1), self.rules.get("right", -1)),
        }
        if not self.lengths:
            return oracle(query, key, value, options=options)
        out = torch.zeros_like(query)
        lse = query.new_full((self.heads, query.shape[0]), -math.inf)
        q_at = k_at = 0
        for q_len, k_len in self.lengths:
            q, k, v = (
                x[at : at + n].transpose(0, 1)[None]
                for x, at, n in ((query, q_at, q_len), (key, k_at, k_len), (value, k_at, k_len))
            )
            some, lse_some = oracle(q, k, v, options=options)
            out[q_at : q_at + q_len] = some[0].transpose(0, 1)
            lse[:, q_at : q_at + q_len] = lse_some[0]
            q_at, k_at = q_at + q_len, k_at + k_len
        return out, lse


def simulated(call: Call, monkeypatch: Any, seed: object = 0, edit: Any = None) -> tuple[Tensor, Tensor]:
    """Output and LSE of the forward kernel in the simulator."""
    forward = kernel("fastformer.kernels.attention.hopper_forward", "forward_kernel", edit)
    forward.seed = seed
    monkeypatch.setattr(hopper, "forward_kernel", forward)
    run = hopper.bind_forward(call, None)
    assert run is not None, "the Hopper kernels do not take this call"
    return run(*call.tensors)


def simulated_gradients(
    problem: Problem,
    inputs: list[Tensor],
    grad_out: Tensor,
    monkeypatch: Any,
    seed: object = 0,
    edit: Any = None,
    grad_lse: Tensor | None = None,
    known: list[Tensor] | None = None,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
    """(dQ, dK, dV, delta) from the simulated backward kernels; the same by autograd in the working dtype and in
    float64, from whose output and LSE the kernels start.

    Args:
        edit: as of `kernel`, of both modules.
        grad_lse: gradient of the LSE, or None.
        known: inputs of the reference, if they are others.
    """
    for name in ("query", "key"):
        module = f"fastformer.kernels.attention.hopper_backward_{name}"
        simulated = kernel(module, f"backward_{name}_kernel", edit)
        simulated.seed = seed
        monkeypatch.setattr(hopper, f"backward_{name}_kernel", simulated)
    measured = []
    out = lse = torch.empty(0)
    for dtype in (problem.dtype, torch.float64):
        leaves = [x.detach().to(dtype).requires_grad_() for x in known or inputs]
        out, lse = problem.expected(*leaves)
        # A row that sees nothing has an LSE of -inf and no gradient.
        sent = [grad_out.to(dtype)] + ([] if grad_lse is None else [grad_lse.to(dtype).where(lse.isfinite(), 0.0)])
        gradients = torch.autograd.grad([out, lse][: len(sent)], leaves, sent, retain_graph=True)
        delta = (out * sent[0]).sum(-1).detach()
        delta = delta.t() if problem.lengths else delta
        delta = (delta if grad_lse is None else delta - sent[1]).where(lse.isfinite(), 0.0)
        measured.append((*gradients, delta))
    call = problem.call(*inputs)
    out, lse = out.detach().to(problem.dtype), lse.detach().float().contiguous()
    dq, dk, dv = (torch.empty_strided(*call.layout_like(x), dtype=x.dtype).fill_(math.nan) for x in inputs)
    layouts = [None if x is None else x.stride() for x in (out, grad_out, grad_lse, dq, dk, dv)]
    run = hopper.bind_backward(call, None, *layouts)
    assert run is not None, "the Hopper kernels do not take this call"
    ours = run(*call.tensors, out, lse, grad_out, grad_lse, (dq, dk, dv))
    return ours, measured[0], measured[1]
