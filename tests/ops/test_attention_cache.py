"""attention_kv_cache: every option against the definition, over caches whose unused places hold NaN."""

import math
import random

import pytest
import torch
from attention_oracle import as_exact, oracle

import fastformer.ops.attention.cache as attention_cache
import fastformer.ops.attention.kernel as attention_kernel
from fastformer.ops import attention_kv_cache
from fastformer.ops.operator import Kinds


def turned(x, cos, sin, position, interleaved):
    """(S, H, D) as pairs of complex numbers times e^(i angle), in x's dtype at fp32 or better."""
    wide = torch.promote_types(x.dtype, torch.float32)
    r = 2 * cos.shape[1]
    angle = torch.complex(cos.to(wide)[position], sin.to(wide)[position])[:, None]
    part = x[..., :r].to(wide).contiguous()
    pairs = part.unflatten(-1, (-1, 2)) if interleaved else part.unflatten(-1, (2, -1)).transpose(-1, -2)
    pairs = torch.view_as_real(torch.view_as_complex(pairs.clone(memory_format=torch.contiguous_format)) * angle)
    part = pairs.flatten(-2) if interleaved else pairs.transpose(-1, -2).flatten(-2)
    return torch.cat([part.to(x.dtype), x[..., r:]], -1)


class Case:
    """One random call: a cache of NaN with sequences in it, new tokens, options."""

    def __init__(self, number, device, dtypes):
        pick, g = random.Random(number), torch.Generator().manual_seed(number)
        self.number, self.dtype = number, pick.choice(dtypes)
        batch, kv_heads, groups = pick.choice([1, 1, 2, 3]), pick.choice([1, 1, 2, 3]), pick.choice([1, 1, 2, 4, 7])
        heads, dim = kv_heads * groups, pick.choice([2, 8, 16, 24, 32, 64, 80])
        value_dim = dim if pick.random() < 0.7 else pick.choice([1, 7, 16, 40])
        self.fresh = pick.choice([0, 1, 1, 1, 2, 5, 17])
        q_len = self.fresh if self.fresh and pick.random() < 0.8 else pick.choice([1, 1, 2, 3, 19])
        longest = pick.choice([1, 15, 16, 17, 40, 130, 200])
        self.lengths = [pick.choice([0, longest, pick.randint(0, longest)]) for _ in range(batch)]
        page = pick.choice([0, 0, 1, 5, 16, 32])
        slots = longest + self.fresh + pick.choice([0, 3, 80])

        def draw(*shape, scale=1.0):
            return torch.randn(shape, generator=g).mul_(scale).to(device, self.dtype)

        def last_dim_in_nan(x):
            room = torch.full((*x.shape[:-1], x.shape[-1] + 3), math.nan, dtype=x.dtype, device=device)
            room[..., 1:-2] = x
            return room[..., 1:-2]

        history = [draw(batch, slots, kv_heads, d) for d in (dim, value_dim)]
        self.query = last_dim_in_nan(draw(batch, q_len, heads, dim, scale=pick.choice([1.0, 3.0])))
        self.new = [last_dim_in_nan(draw(batch, self.fresh, kv_heads, d)) for d in (dim, value_dim)]
        caches = [torch.full_like(x, math.nan) for x in history]
        for cache, kept in zip(caches, history, strict=True):
            for i, n in enumerate(self.lengths):
                cache[i, :n] = kept[i, :n]
        self.history, self.table = history, None
        if page:
            blocks = -(-slots // page)
            order = torch.randperm(batch * blocks + 2, generator=g)[: batch * blocks].to(device)
            pages = []
            for cache in caches:
                padded = torch.full((batch, blocks * page, *cache.shape[2:]), math.nan, dtype=self.dtype, device=device)
                padded[:, :slots] = cache
                paged = torch.full(
                    (batch * blocks + 2, page, *cache.shape[2:]), math.nan, dtype=self.dtype, device=device
                )
                paged[order] = padded.view(-1, page, *cache.shape[2:])
                pages.append(paged)
            caches, self.table = pages, order.view(batch, blocks).int()
            for i, n in enumerate(self.lengths):  # whatever lies behind the end is no page
                self.table[i, -(-(n + self.fresh) // page) :] = pick.choice([-1, 10**6])
        elif pick.random() < 0.3:  # heads before tokens in memory
            caches = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in caches]
        self.caches = [last_dim_in_nan(x) if pick.random() < 0.3 else x for x in caches]
        self.seqlens = torch.tensor(self.lengths, dtype=torch.int32, device=device)
        self.options, self.extras, self.rotary = {"is_causal": pick.random() < 0.7}, {}, {}
        if pick.random() < 0.3:
            self.options["window"] = (pick.choice([None, 0, 3, 20]), pick.choice([None, 0, 5, 30]))
        if pick.random() < 0.2:
            self.options["softcap"] = pick.choice([1.0, 5.0])
        if pick.random() < 0.3:
            self.options["scale"] = pick.choice([0.1, 0.7])
        if pick.random() < 0.2:
            shape = pick.choice([(heads,), (batch, heads)])
            self.extras["alibi_slopes"] = torch.rand(shape, generator=g).to(device)
        if pick.random() < 0.2:
            self.extras["sinks"] = torch.randn(heads, generator=g).to(device)
        if self.fresh and pick.random() < 0.5:
            r = pick.choice([dim, max(2, dim // 2 // 2 * 2)])
            angles = torch.rand((slots + 1, r // 2), generator=g) * 6
            wide = pick.choice([torch.float32, self.dtype])
            self.rotary = {"cos": angles.cos().to(device, wide), "sin": angles.sin().to(device, wide)}
            self.rotary["interleaved"] = pick.random() < 0.5
            # Queries before their sequence's start have no angle; causal, they see nothing.
            self.options["is_causal"] |= q_len > self.fresh

    def __str__(self):
        shapes = [tuple(x.shape) for x in (self.query, *self.caches, self.new[0])]
        given = sorted({**self.extras, **self.rotary})
        return f"Case({self.number}): {shapes} {self.dtype} lengths {self.lengths} {self.options} {given}"

    def held(self, which, i):
        """Sequence i's room in the cache, (S, Hk, D)."""
        if self.table is None:
            return self.caches[which][i]
        pages = self.table[i][: -(-(self.lengths[i] + self.fresh) // self.caches[which].shape[1])]
        return self.caches[which][pages.long()].flatten(0, 1)

    def check(self):
        untouched = [x.clone() for x in self.caches]
        appended = self.new if self.fresh else (None, None)
        out, lse = attention_kv_cache(
            self.query, *self.caches, self.seqlens, self.table, *appended,
            **self.options, **self.extras, **self.rotary, return_lse=True,
        )  # fmt: skip
        assert out.shape == (*self.query.shape[:3], self.new[1].shape[3])
        assert out.dtype == self.dtype
        assert lse.dtype == (torch.float64 if self.dtype == torch.float64 else torch.float32)
        written = 0
        for i, n in enumerate(self.lengths):
            total, q_len = n + self.fresh, self.query.shape[1]
            key, value = (torch.cat([self.history[w][i, :n], self.new[w][i]]) for w in range(2))
            query = self.query[i]
            if self.rotary:
                positions = torch.arange(total, device=query.device)
                key = torch.cat([key[:n], turned(key[n:], *self.angles(), positions[n:], self.rotary["interleaved"])])
                places = torch.arange(total - q_len, total, device=query.device)
                lost = places < 0  # those see nothing
                query = turned(query, *self.angles(), places.clamp(min=0), self.rotary["interleaved"])
                query = query.masked_fill(lost[:, None, None], 0.0)
            for which, expected in enumerate((key, value)):
                held = self.held(which, i)
                assert torch.equal(held[:n], expected[:n]), "what was cached has changed"
                torch.testing.assert_close(held[n:total], expected[n:], rtol=2 * torch.finfo(self.dtype).eps, atol=1e-6)
                assert held[total:].isnan().all(), "written behind the end"
                written += held[n:total].numel()
            # As the cache holds them: the oracle is not to blame for the rounding of a turned key.
            key = self.held(0, i)[:total]
            slopes = self.extras.get("alibi_slopes")
            rest = {"options": {**self.options, "causal_alignment": "bottom-right"}, "sinks": self.extras.get("sinks")}
            rest["alibi_slopes"] = slopes if slopes is None or slopes.ndim == 1 else slopes[i]
            given = [x[None].transpose(1, 2) for x in (query, key, value)]
            stock, exact = oracle(*given, **rest), oracle(*(x.double() for x in given), **rest)
            rows = exact[1] != -math.inf
            assert torch.equal(lse[i][None] != -math.inf, rows), "rows without anything to attend to differ"
            ours = out[i][None].transpose(1, 2)
            assert (ours.masked_select(~rows[..., None]) == 0).all(), "a row without anything to attend to is not 0"
            as_exact(ours, stock[0], exact[0], "output")
            as_exact(*(torch.where(rows, x, 0.0) for x in (lse[i][None], stock[1], exact[1])), "lse")
        changed = sum(
            (a.nan_to_num(7.0) != b.nan_to_num(7.0)).sum().item() for a, b in zip(self.caches, untouched, strict=True)
        )
        assert changed <= written, "written outside the sequences"

    def angles(self):
        return self.rotary["cos"], self.rotary["sin"]


def check(number, device, interpreting):
    dtypes = [torch.float32, torch.float16] + ([] if interpreting else [torch.bfloat16])
    case = Case(number, device, dtypes)
    try:
        case.check()
    except AssertionError as error:
        raise AssertionError(f"{error}\n{case}") from None


@pytest.mark.parametrize("number", [*range(60), 1019])  # the last: an error of a product summed in one chain
def test_fuzz(number, device, interpreting, poisoned):
    check(number, device, interpreting)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(10))
def test_fuzz_at_length(block, device, interpreting, poisoned):
    """1,000 more; the interpreter takes 30 of every 100."""
    failures = []
    for number in range(1000 + 100 * block, 1000 + 100 * block + (30 if interpreting else 100)):
        try:
            check(number, device, interpreting)
        except AssertionError as error:
            failures.append(str(error))
    assert not failures, "\n".join(failures)


def call(device, batch=2, q_len=1, heads=4, kv_heads=2, dim=16, slots=200, dtype=torch.float32, seed=0):
    """query, caches, lengths of a call without new tokens."""
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, q_len, heads, dim, generator=g).to(device, dtype)
    caches = [torch.randn(batch, slots, kv_heads, dim, generator=g).to(device, dtype) for _ in range(2)]
    lengths = torch.randint(q_len, slots + 1, (batch,), generator=g).to(device, torch.int32)
    return query, *caches, lengths


@pytest.mark.parametrize("splits", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("options", [{}, {"window": (30, 0)}, {"softcap": 2.0, "is_causal": False}])
def test_any_number_of_splits_gives_the_same(splits, options, device, monkeypatch, poisoned, interpreting):
    """Most of them have no keys at all at 64."""
    args = call(device, q_len=3)
    args[3][0] = 5
    expected, norm = attention_kv_cache(*args, **options, return_lse=True)
    if interpreting or device.type == "cuda":
        decode = pytest.importorskip("fastformer.kernels.attention.decode")
        monkeypatch.setattr(decode, "count_splits", lambda *_: splits)
        monkeypatch.setattr(decode, "_bound", {})
        monkeypatch.setattr(attention_cache, "_kinds", Kinds())
    out, lse = attention_kv_cache(*args, **options, return_lse=True)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, norm, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("where", ["behind the window", "behind the end", "seen by the last query alone"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_a_query_does_not_see_does_not_reach_it(where, value, device):
    query, k_cache, v_cache, lengths = call(device, batch=1, q_len=3)
    lengths[:] = 150
    options = {"window": (40, 0)}
    clean = attention_kv_cache(query, k_cache, v_cache, lengths, **options)
    place = {"behind the window": slice(0, 107), "behind the end": slice(150, None)}.get(where, slice(149, 150))
    for cache in (k_cache, v_cache):
        cache[:, place] = value
    out = attention_kv_cache(query, k_cache, v_cache, lengths, **options)
    if place.start == 149:
        assert out[:, 2].isnan().all()
        out, clean = out[:, :2], clean[:, :2]
    torch.testing.assert_close(out, clean, rtol=0, atol=0)


def test_nothing_cached(device):
    query, k_cache, v_cache, lengths = call(device)
    lengths[:] = 0
    out, lse = attention_kv_cache(query, k_cache, v_cache, lengths, return_lse=True)
    assert (out == 0).all()
    assert (lse == -math.inf).all()
    empty = attention_kv_cache(query[:0], k_cache[:0], v_cache[:0], lengths[:0])
    assert empty.shape == (0, *query.shape[1:])


def test_positions_beyond_the_table_give_nan(device):
    query, k_cache, v_cache, lengths = call(device, batch=2)
    lengths[:] = torch.tensor([3, 9])
    new = torch.ones(2, 1, 2, 16, device=device)
    angles = torch.ones(8, 4, device=device)
    out = attention_kv_cache(query, k_cache, v_cache, lengths, None, new, new, cos=angles, sin=angles)
    assert out[0].isfinite().all()
    assert out[1].isnan().all()
    assert k_cache[0, 3].isfinite().all()
    assert k_cache[1, 9, :, :8].isnan().all()
    assert (k_cache[1, 9, :, 8:] == 1).all()


def test_the_kernels_take_the_call(device, interpreting, monkeypatch):
    """Every option at once, without PyTorch's operations standing in."""
    if not interpreting and device.type != "cuda":
        pytest.skip("the kernels do not run here")
    monkeypatch.setattr(attention_kernel, "say_once", lambda reason: pytest.fail(reason))
    for queries, dim in ((1, 80), (3, 512)):
        query, k_cache, v_cache, lengths = call(device, dim=dim, q_len=queries)
        new, angles = torch.ones(2, queries, 2, dim, device=device), torch.ones(201, 20, device=device)
        lengths -= queries
        attention_kv_cache(
            query, k_cache, v_cache, lengths, None, new, new, cos=angles, sin=angles, interleaved=True, window=(9, 9),
            softcap=3.0, alibi_slopes=torch.ones(4, device=device), sinks=torch.ones(4, device=device), scale=0.2,
        )  # fmt: skip


def test_names_what_is_wrong(device):
    query, k_cache, v_cache, lengths = call(device, slots=8)
    new, angles = torch.ones(2, 1, 2, 16, device=device), torch.ones(8, 8, device=device)
    lengths[:] = 4
    with pytest.raises(ValueError, match="cos and sin must be given both or neither, and with k and v"):
        attention_kv_cache(query, k_cache, v_cache, lengths, cos=angles, sin=angles)
    with pytest.raises(ValueError, match="cos and sin must be given both or neither"):
        attention_kv_cache(query, k_cache, v_cache, lengths, None, new, new, cos=angles)
    with pytest.raises(ValueError, match=r"sin must be \(positions, R / 2\) with 0 < R <= 16"):
        attention_kv_cache(query, k_cache, v_cache, lengths, None, new, new, cos=angles, sin=angles[:, :4])
    wide = torch.ones(8, 9, device=device)
    with pytest.raises(ValueError, match=r"cos must be \(positions, R / 2\)"):
        attention_kv_cache(query, k_cache, v_cache, lengths, None, new, new, cos=wide, sin=wide)
    with pytest.raises(TypeError, match="block_table must be one of int32"):
        attention_kv_cache(query, k_cache, v_cache, lengths, torch.zeros(2, 1, device=device))
    with pytest.raises(ValueError, match="window's left side"):
        attention_kv_cache(query, k_cache, v_cache, lengths, window=(-2, 0))
    if device.type == "cpu":
        for wrong in (8, -1):
            lengths[1] = wrong
            with pytest.raises(ValueError, match=r"cache_seqlens must lie between 0 and 7.*got \[4, "):
                attention_kv_cache(query, k_cache, v_cache, lengths, None, new, new)


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("append", [False, True])
def test_opcheck(paged, append, device, interpreting):
    if not interpreting and device.type != "cuda":
        pytest.skip("the operators are the kernels'")
    query, k_cache, v_cache, lengths = call(device, slots=32)
    lengths[:] = 5
    table = None
    if paged:
        k_cache, v_cache = (x.reshape(8, 8, 2, 16) for x in (k_cache, v_cache))
        table = torch.arange(8, dtype=torch.int32, device=device).view(2, 4)
    rules = (True, 0.25, -1, -1, 0.0)
    if append:
        new = torch.ones(2, 1, 2, 16, device=device)
        args = (query, k_cache, v_cache, lengths, table, new, new, None, None, None, None, *rules, False)
        torch.library.opcheck(torch.ops.fastformer.attention_kv_cache.default, args)
    else:
        args = (query, k_cache, v_cache, lengths, table, None, None, *rules)
        torch.library.opcheck(torch.ops.fastformer.attention_cached.default, args)


@pytest.mark.parametrize("append", [False, True])
def test_compiled_whole(append, device):
    """One graph, for changing lengths and sizes; the cache is written in place."""
    torch._dynamo.reset()

    def step(query, k_cache, v_cache, lengths, k, v):
        return attention_kv_cache(query, k_cache, v_cache, lengths, None, k, v) * 2.0

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    for slots in (32, 48):
        query, k_cache, v_cache, lengths = call(device, slots=slots)
        lengths -= 1
        new = torch.full((2, 1, 2, 16), 0.5, device=device) if append else None
        theirs = [k_cache.clone(), v_cache.clone()]
        expected = step(query, *theirs, lengths, new, new)
        torch.testing.assert_close(compiled(query, k_cache, v_cache, lengths, new, new), expected)
        assert torch.equal(k_cache, theirs[0])
        assert torch.equal(v_cache, theirs[1])
    torch._dynamo.reset()
