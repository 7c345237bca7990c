"""What attention tests share: random calls over every option, and the oracle that states the rules once more, apart
from the library."""

import math
import random
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


def oracle(query, key, value, attn_mask=None, *, options, sinks=None, alibi_slopes=None, keep=None, seen=None):
    """(B, H, Sq, Dv) and LSE by the definition, in the dtype of the inputs; hidden rows give 0 and -inf.

    Args:
        keep: dropout's mask, True where a probability survives.
        seen: (Sq, Sk) or wider bool, what the sequence's ends leave visible.
    """
    heads, q_len, k_len = query.shape[1], query.shape[2], key.shape[2]
    key = key.repeat_interleave(heads // key.shape[1], 1)
    value = value.repeat_interleave(heads // value.shape[1], 1)
    scale = options.get("scale") or 1 / math.sqrt(query.shape[-1])
    scores = query @ key.mT * scale
    if options.get("softcap"):
        scores = options["softcap"] * (scores / options["softcap"]).tanh()
    shift = k_len - q_len if options.get("causal_alignment") == "bottom-right" else 0
    distance = torch.arange(k_len)[None, :] - (torch.arange(q_len)[:, None] + shift)  # key place - query place
    distance = distance.to(query.device)
    visible = torch.ones_like(distance, dtype=torch.bool) if seen is None else seen
    if options.get("is_causal"):
        visible = visible & (distance <= 0)
    left, right = options.get("window") or (None, None)
    if left is not None and left >= 0:
        visible = visible & (distance >= -left)
    if right is not None and right >= 0:
        visible = visible & (distance <= right)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(scores.dtype)[..., None, None] * distance.abs()
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            visible = visible & attn_mask
        else:
            scores = scores + attn_mask.to(scores.dtype)
            visible = visible & (attn_mask != -math.inf)
    visible = visible.expand(scores.shape)
    logits = scores.masked_fill(~visible, -math.inf)
    if sinks is not None:
        column = sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        logits = torch.cat([logits, column], -1)
    hopeless = (logits == -math.inf).all(-1, keepdim=True)
    safe = logits.masked_fill(hopeless, 0.0)
    weights = safe.softmax(-1).masked_fill(hopeless, 0.0)[..., :k_len]
    lse = safe.logsumexp(-1).masked_fill(hopeless.squeeze(-1), -math.inf)
    if keep is not None:
        p = options["dropout_p"]
        weights = weights * keep / (1 - p) if p < 1 else weights * 0
    return weights @ value, lse


def place(shape, dtype, pick, generator, device, scale=1.0) -> Tensor:
    """Random (B, H, S, D) in one of the layouts callers use, inside a buffer of NaN."""
    batch, heads, length, dim = shape
    layout = pick.choice(["plain", "tokens first", "packed", "gaps"])
    values = torch.randn(shape, generator=generator).mul_(scale).to(device, dtype)
    if layout == "plain":
        buffer = torch.full((batch * heads * length * dim + 64,), math.nan, dtype=dtype, device=device)
        view = buffer[32 : 32 + values.numel()].view(shape)
    elif layout == "tokens first":
        view = torch.full((batch, length + 2, heads, dim), math.nan, dtype=dtype, device=device)[:, 1:-1].transpose(
            1, 2
        )
    elif layout == "packed":
        view = torch.full((batch, length, 3, heads, dim), math.nan, dtype=dtype, device=device)[:, :, 1].transpose(1, 2)
    else:
        view = torch.full((batch, heads + 1, length + 3, dim + 5), math.nan, dtype=dtype, device=device)
        view = view[:, :heads, 2 : 2 + length, 3 : 3 + dim]
    return view.copy_(values)


@dataclass
class Case:
    """One random call: tensors by name (differentiated where floating), and plain options."""

    number: int
    tensors: dict[str, Tensor]
    options: dict[str, Any]
    extras: dict[str, Tensor] = field(default_factory=dict)

    def __str__(self) -> str:
        shapes = {k: (tuple(v.shape), str(v.dtype).removeprefix("torch.")) for k, v in self.tensors.items()}
        return f"random_case({self.number}): {shapes} {self.options} extras {sorted(self.extras)}"


def random_case(number: int, device, dtypes, longest: int = 70) -> Case:
    """Draws every option, layout and odd length; the same for the same number."""
    pick = random.Random(number)
    generator = torch.Generator().manual_seed(number)
    dtype = pick.choice(dtypes)
    batch, kv_heads, groups = pick.choice([1, 1, 2, 3]), pick.choice([1, 2, 3]), pick.choice([1, 1, 1, 2, 3])
    heads = kv_heads * groups
    q_len = pick.choice([1, 2, 15, 16, 17, 31, 33, pick.randint(1, longest)])
    k_len = pick.choice([q_len, q_len, 1, 16, 19, pick.randint(1, longest)])
    if pick.random() < 0.03:
        k_len = 0
    dim = pick.choice([1, 5, 8, 16, 16, 24, 32, 64])
    value_dim = dim if pick.random() < 0.7 else pick.choice([1, 7, 16, 40])
    scale = pick.choice([1.0, 1.0, 3.0])
    tensors = {
        "query": place((batch, heads, q_len, dim), dtype, pick, generator, device, scale),
        "key": place((batch, kv_heads, k_len, dim), dtype, pick, generator, device, scale),
        "value": place((batch, kv_heads, k_len, value_dim), dtype, pick, generator, device),
    }
    options: dict[str, Any] = {"enable_gqa": groups > 1}
    extras: dict[str, Tensor] = {}
    kind = pick.choice(["none", "none", "key", "bool", "float", "float"])
    if kind != "none":
        sizes = (batch, heads, q_len, k_len)
        shape = [s if pick.random() < 0.6 else 1 for s in sizes]
        if kind == "key":
            shape = [batch, 1, 1, k_len]
        shape = shape[pick.choice([0, 0, 0, 1, 2]) :] if shape[0] == 1 else shape
        hidden = torch.rand(shape, generator=generator) < pick.choice([0.1, 0.5, 0.9])
        if kind == "float":
            bias = torch.randn(shape, generator=generator)
            if pick.random() < 0.5:
                bias = bias.masked_fill(hidden, -math.inf)
            tensors["attn_mask"] = bias.to(device, pick.choice([dtype, torch.float32]))
        else:
            extras["attn_mask"] = ~hidden.to(device)
    if pick.random() < 0.4:
        options["is_causal"] = True
    options["causal_alignment"] = pick.choice(["top-left", "bottom-right"])
    if pick.random() < 0.3:
        options["window"] = (pick.choice([None, 0, 3, 20]), pick.choice([None, 0, 5, 30]))
    if pick.random() < 0.2:
        options["softcap"] = pick.choice([1.0, 5.0, 30.0])
    if pick.random() < 0.2:
        shape = pick.choice([(heads,), (batch, heads)])
        tensors["alibi_slopes"] = torch.rand(shape, generator=generator).to(device)
    if pick.random() < 0.2:
        tensors["sinks"] = torch.randn(heads, generator=generator).to(device)
    if pick.random() < 0.3:
        options["dropout_p"] = pick.choice([0.1, 0.5, 1.0])
        extras["dropout_seed"] = torch.tensor([number * 7919 - 12345], device=device)
    if pick.random() < 0.3:
        options["scale"] = pick.choice([0.1, 0.7])
    return Case(number, tensors, options, extras)


def run(function, tensors: dict[str, Tensor], sent: list[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Output, LSE and the gradients under the cotangents `sent` (rows without anything to attend to send nothing)."""
    leaves = {k: v.detach().requires_grad_() for k, v in tensors.items()}
    before = {k: v.detach().clone() for k, v in leaves.items()}
    out, lse = function(**leaves)
    rows = lse != -math.inf
    loss = (out * sent[0].to(out)).sum() + torch.where(rows, lse * sent[1].to(lse), 0.0).sum()
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    for k, v in leaves.items():
        assert torch.equal(v.detach().nan_to_num(), before[k].nan_to_num()), f"{k} was modified"
    grads = {k: torch.zeros_like(v) if g is None else g for (k, v), g in zip(leaves.items(), found, strict=True)}
    return [out.detach(), lse.detach()], grads


def as_exact(ours: Tensor, stock: Tensor, exact: Tensor, name: str, terms: float = 0.0) -> None:
    """Error at most twice the measure's, plus four ulps of the largest value (or of the terms it is a difference of):
    a maximum over few elements can be lucky."""
    assert ours.shape == exact.shape, f"{name}: shape {tuple(ours.shape)}, not {tuple(exact.shape)}"
    if exact.numel() == 0:
        return
    assert ours.isfinite().all(), f"{name}: not finite"
    error = (ours.double() - exact).abs().max().item()
    allowed = 2 * (stock.double() - exact).abs().max().item()
    allowed += 4 * torch.finfo(ours.dtype).eps * max(exact.abs().max().item(), terms) + 1e-30
    assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"


def gradient_terms(case: Case, grad: Tensor) -> dict[str, float]:
    """Size of the terms whose differences the gradients are: dS = P (dP - delta), where dP and delta nearly cancel."""
    query, key, value = (case.tensors[k].double() for k in ("query", "key", "value"))
    if not key.numel():
        return {}
    p = case.options.get("dropout_p", 0.0)
    dp = grad.to(value.device).abs().max().item() * value.abs().max().item() * math.sqrt(value.shape[-1])
    dp *= 1 / (1 - p) if p < 1 else 0.0
    scale = case.options.get("scale") or 1 / math.sqrt(query.shape[-1])
    # The backward pass takes the probabilities from exp(score - lse), whose error is an ulp of the score.
    score = scale * query.abs().max().item() * key.abs().max().item() * math.sqrt(query.shape[-1])
    return {
        "value": grad.abs().max().item() * score,
        "query": dp * scale * key.abs().max().item(),
        "key": dp * scale * query.abs().max().item(),
        "attn_mask": dp,
        "sinks": dp,
        # As above, times the distances.
        "alibi_slopes": dp * max(query.shape[-2], key.shape[-2]),
    }


def check(case: Case, function, oracle_function) -> None:
    """Hold `function` against the oracle in float64, with the oracle in the inputs' own dtype as the measure."""
    generator = torch.Generator().manual_seed(case.number)
    shape = oracle_function(**case.tensors)[0].shape
    sent = [torch.randn(shape, generator=generator), torch.randn(shape[:-1], generator=generator)]
    sent = [s.to(case.tensors["query"].dtype).double() for s in sent]
    ours, our_grads = run(function, case.tensors, sent)
    stock, stock_grads = run(oracle_function, case.tensors, sent)
    exact, exact_grads = run(oracle_function, {k: v.double() for k, v in case.tensors.items()}, sent)
    rows = exact[1] != -math.inf
    terms = gradient_terms(case, sent[0])
    try:
        assert torch.equal(ours[1] != -math.inf, rows), "rows without anything to attend to differ"
        assert (ours[0].masked_select(~rows.unsqueeze(-1)) == 0).all(), "a row without anything to attend to is not 0"
        as_exact(ours[0], stock[0], exact[0], "output")
        as_exact(*(torch.where(rows, x[1], 0.0) for x in (ours, stock, exact)), "lse")
        for k, g in our_grads.items():
            assert g.dtype == case.tensors[k].dtype
            as_exact(g, stock_grads[k], exact_grads[k], f"gradient of {k}", terms.get(k, 0.0))
    except AssertionError as error:
        raise AssertionError(f"{error}\n{case}") from None
