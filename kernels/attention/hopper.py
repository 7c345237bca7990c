"""Launchers of the Hopper kernels, and which calls they take.

What follows from a call's shapes, strides and options is derived once and kept with the call's other launches: whether
the kernels take it, its tensors as TMA sees them, the numbers. Descriptors are kept by address: an allocator gives the
same ones again. Their 128-byte form is encoded by Triton's own launcher at every launch: it keeps none, and takes none.
"""

from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fastformer.kernels.attention import hopper_backward_key as by_key
from fastformer.kernels.attention import hopper_backward_query as by_query
from fastformer.kernels.attention import hopper_forward as by_rows
from fastformer.kernels.attention.call import Call
from fastformer.kernels.launch import Bound, launcher
from fastformer.kernels.rows import cdiv, dense_strides

BLOCK = 128  # query rows of a program
# Head dimension: (tile of keys, stages). Two 16-bit buffers a stage beside the queries fit 227 KiB.
FORWARD = {64: (128, 3), 128: (128, 2), 256: (64, 2)}
# dK and dV: head dimension: (tile of queries, stages).
KEY = {64: (64, 3), 128: (64, 2), 256: (64, 2)}
NARROW_KEY = {**KEY, 128: (32, 4)}  # with softcap: it holds one more tile (580 bytes of spills)
# The ptxas of Triton 3.9 spills 36 to 44 bytes with the wider tiles.
if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8):
    FORWARD |= {64: (64, 4), 128: (64, 4)}
    KEY = NARROW_KEY
# dQ: head dimension: (tile of keys, tiles in the ring; keys and values are two).
QUERY = {64: (64, 6), 128: (64, 6), 256: (64, 3)}
# Of an H100's or H200's 50 MB, what keys and values may take while other data passes through.
_L2_BYTES = 24 << 20
_KEPT = 256  # descriptors remembered for one argument of one kind of launch
_DTYPES = (torch.float16, torch.bfloat16)
_LAYOUT = NVMMASharedLayout(128, 16, 2)
_VECTOR = NVMMASharedLayout(0, 32, 1)

forward_kernel = launcher(by_rows.forward_kernel)
backward_query_kernel = launcher(by_query.backward_query_kernel)
backward_key_kernel = launcher(by_key.backward_key_kernel)


Layout = tuple[int, ...]  # strides of a tensor


class _Address:
    """Of a tensor, what Triton's launcher asks for: its descriptor outlives it, and serves the next one there."""

    def __init__(self, pointer: int) -> None:
        self.pointer = pointer

    def data_ptr(self) -> int:
        return self.pointer


class _View:
    """Makes descriptors of tensors of one kind, which it checks once. They must lie on multiples of 16 bytes.

    Args:
        x: a tensor of their dtype and device.
        shape, pitch, block, layout: as of TensorDescriptor; pitch in elements.

    Attributes:
        known: descriptors by address, for launches that repeat an earlier one.
    """

    def __init__(self, x: Tensor, shape: list[int], pitch: list[int], block: list[int], layout: Any) -> None:
        # Of memory of its own: x may lie anywhere, and would live as long as the launches.
        like = TensorDescriptor(torch.empty(16, dtype=x.dtype, device=x.device), shape, pitch, block, layout)
        self.fields = {name: value for name, value in vars(like).items() if name != "base"}
        self.known: dict[int, TensorDescriptor] = {}

    def __call__(self, tensor: Tensor) -> TensorDescriptor:
        return self._of(tensor)

    def at(self, pointer: int) -> TensorDescriptor:
        """For a tensor at this address."""
        if len(self.known) >= _KEPT:
            self.known.clear()
        made = self.known[pointer] = self._of(_Address(pointer))
        return made

    def _of(self, base: Any) -> TensorDescriptor:
        made = object.__new__(TensorDescriptor)
        vars(made).update(self.fields, base=base)
        return made


class Aligned(Bound):
    """A launch that answers True, and launches nothing, where a tensor that it views does not begin at 16 bytes."""

    __slots__ = ()

    def __call__(self, *tensors: Tensor | None) -> bool | None:
        if any(t is not None and t.data_ptr() & 15 for t in tensors[: len(self.views)]):
            return True
        super().__call__(*tensors)
        return None


class _Plane:
    """A tensor as a 2-D array of tokens: element 0 of a token's head lies in some row, at some column.

    Attributes:
        steps: what a sequence or head adds to the row, and a head to the column.
    """

    def __init__(self, tensor: Tensor, strides: tuple[int, int, int]) -> None:
        """strides: of (batch, head, token) in elements.

        Raises:
            ValueError: the tensor does not lie so.
        """
        batch, head, token = strides
        size = tensor.shape[-1]
        heads = tensor.shape[1]
        batches = tensor.shape[0] if tensor.ndim == 4 else 1
        length = tensor.shape[-2] if tensor.ndim == 4 else tensor.shape[0]
        # A dimension of one element may carry any stride.
        batch, head = batch if batches > 1 else 0, head if heads > 1 else 0
        token = token if length > 1 else max(batch, head, size)
        in_row = head * (heads - 1) + size <= token
        if token < size or batch % token or (not in_row and head % token):
            raise ValueError
        if token % 8 or (in_row and head % 8):
            raise ValueError
        row_batch = batch // token
        row_head, column_head = (0, head) if in_row else (head // token, 0)
        rows = (batches - 1) * row_batch + (heads - 1) * row_head + length
        width = (heads - 1) * column_head + size
        if max(rows, width, (batches + 1) * row_batch) >= 2**31 - 2**9:
            raise ValueError
        self.tensor, self.shape, self.pitch = tensor, [rows, width], token
        self.steps = row_batch, row_head, column_head

    def view(self, rows: int) -> _View:
        """For tiles of that many tokens."""
        return _View(self.tensor, self.shape, [self.pitch, 1], [rows, self.tensor.shape[-1]], _LAYOUT)


def _row_view(call: Call, rows: int) -> _View:
    """LSE or delta, in tiles of so many numbers."""
    like = torch.empty(0, dtype=torch.float32, device=call.query.device)
    return _View(like, [call.query[..., 0].numel()], [1], [rows], _VECTOR)


def _planes(call: Call, *more: Layout) -> list[_Plane] | None:
    """Query, key, value, and like the query `more` with these strides; None for a call that the kernels do not take."""
    rules = call.mask is not None or call.slopes is not None or call.sinks is not None or call.constants["DROPOUT"]
    if rules or call.head_dim != call.value_dim or call.head_dim not in FORWARD:
        return None
    # The largest score is looked for before scaling; offsets within a tile of the output are 32-bit.
    if call.query.dtype not in _DTYPES or call.scales[0] <= 0.0 or BLOCK * call.heads * call.head_dim >= 2**31:
        return None
    if not (call.query.numel() and call.key.numel()):
        return None
    try:
        given = [_Plane(x, call.strides(x)) for x in (call.query, call.key, call.value)]
        return given + [_Plane(call.query, call.along(strides)) for strides in more]
    except ValueError:
        return None


def _constants(call: Call) -> dict[str, Any]:
    names = ("GROUP", "BOTTOM_RIGHT", "CAUSAL", "LEFT", "RIGHT", "SOFTCAP", "HEAD_DIM")
    return {name: call.constants[name] for name in names} | {"num_warps": 4}


def _order(call: Call) -> tuple[int, int, int]:
    """(tiles of queries, planes, planes whose keys and values stay in L2 together)."""
    tiles = max(1, cdiv(call.q_len, BLOCK))
    planes = (call.batch + call.packed) * call.heads
    section = call.constants["GROUP"] * max(1, _L2_BYTES // (4 * max(1, call.k_len) * call.head_dim))
    return tiles, planes, min(section, planes)


def bind_forward(call: Call, portable: Any) -> Any:
    """`attention_forward` by these kernels, as a function of `Call.tensors`; `portable` for calls that they do not
    take: masks, ALiBi, sinks, dropout, other dtypes or head dimensions, memory that TMA cannot address.

    Args:
        portable: the same by the portable kernels; it also runs where a tensor does not begin at 16 bytes.
    """
    planes = _planes(call)
    if planes is None:
        return portable
    device, dtype = call.query.device, call.query.dtype
    tokens = call.query.shape[0] if call.packed else 0
    shape, laid = call.layout_like(call.query)
    rows = (call.heads, tokens) if call.packed else (call.batch, call.heads, call.q_len)
    row_strides = dense_strides(rows)
    block_n, stages = FORWARD[call.head_dim] if not call.constants["SOFTCAP"] else (64, 2)
    tiles, count, section = _order(call)
    q, k, v = planes
    numbers = (
        *q.steps, *k.steps, *v.steps, *call.along(laid), *call.row_strides(), tiles, call.heads, count, section,
        call.q_len, call.k_len, tokens, *call.scales, call.left, call.right,
    )  # fmt: skip
    constants = {**_constants(call), "BLOCK_N": block_n, "STAGES": stages}
    views = (q.view(BLOCK), k.view(block_n), v.view(block_n))
    bound = Aligned(forward_kernel, (tiles * count,), numbers, constants, views)

    def run(
        query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, *others: Tensor | None
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        out = torch.empty_strided(shape, laid, dtype=dtype, device=device)
        lse = torch.empty_strided(rows, row_strides, dtype=torch.float32, device=device)
        if bound.launch(query, key, value, out, lse, cu_q, cu_k):
            return portable(query, key, value, cu_q, cu_k, *others)
        return out, lse

    return run


def bind_backward(
    call: Call, portable: Any, out: Layout, grad_out: Layout, grad_lse: Layout | None, *into: Layout
) -> Any:
    """`attention_backward` by these kernels, as a function of `Call.tensors`, the output, the LSE, their gradients and
    `into`; `portable` for calls that they do not take.

    Args:
        portable: the same by the portable kernels; it also runs where a tensor does not begin at 16 bytes.
        out, grad_out, grad_lse, into: strides of the output, of the gradients, of dQ, dK, dV if they are given.
    """
    planes = _planes(call, grad_out)
    device, dtype = call.query.device, call.query.dtype
    made = [call.layout_like(x) for x in (call.query, call.key, call.value)]
    dq, dk, dv = into or [strides for _, strides in made]
    # dK and dV are addressed alike; offsets within a tile are 32-bit.
    far = BLOCK * max(stride for strides in (out, dq, dk) for stride in strides[-3:-1]) >= 2**31
    if planes is None or dk != dv or far or call.query[..., 0].numel() >= 2**31:
        return portable
    by_query, by_key = _by_query(call, planes, out, grad_lse, dq), _by_key(call, planes, dk)

    def run(
        query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, mask: Tensor | None,
        slopes: Tensor | None, sinks: Tensor | None, seed: Tensor | None, out: Tensor, lse: Tensor, grad_out: Tensor,
        grad_lse: Tensor | None, into: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        dq, dk, dv = into or [torch.empty_strided(*where, dtype=dtype, device=device) for where in made]
        delta = torch.empty_like(lse)
        if by_query.launch(query, key, value, grad_out, out, lse, grad_lse, delta, dq, cu_q, cu_k) or by_key.launch(
            query, key, value, grad_out, lse, delta, dk, dv, cu_q, cu_k
        ):
            biases = (mask, slopes, sinks, seed)
            return portable(query, key, value, cu_q, cu_k, *biases, out, lse, grad_out, grad_lse, into)
        return dq, dk, dv, delta

    return run


def _by_query(call: Call, planes: list[_Plane], out: Layout, grad_lse: Layout | None, dq: Layout) -> Bound:
    block_n, slots = QUERY[call.head_dim]
    tiles, count, section = _order(call)
    dl_strides = (0, 0, 0) if grad_lse is None else (0, *grad_lse) if call.packed else grad_lse
    q, k, v, do = planes
    numbers = (
        *q.steps, *k.steps, *v.steps, *do.steps, *call.along(out), *call.along(dq), *call.row_strides(), *dl_strides,
        tiles, call.heads, count, section, call.q_len, call.k_len, call.query.shape[0] if call.packed else 0,
        call.scale, *call.scales, call.left, call.right,
    )  # fmt: skip
    constants = {**_constants(call), "BLOCK_N": block_n, "SLOTS": slots}
    views = (q.view(BLOCK), k.view(block_n), v.view(block_n), do.view(BLOCK))
    return Aligned(backward_query_kernel, (tiles * count,), numbers, constants, views)


def _by_key(call: Call, planes: list[_Plane], dk: Layout) -> Bound:
    block_m, stages = (NARROW_KEY if call.constants["SOFTCAP"] else KEY)[call.head_dim]
    block_n = BLOCK if call.head_dim <= 128 else BLOCK // 2
    tiles = max(1, cdiv(call.k_len, block_n))
    count = (call.batch + call.packed) * call.kv_heads
    q, k, v, do = planes
    numbers = (
        *q.steps, *k.steps, *v.steps, *do.steps, *call.along(dk), *call.row_strides(), tiles, call.kv_heads, count,
        call.q_len, call.k_len, call.key.shape[0] if call.packed else 0, *call.scales, call.left, call.right,
    )  # fmt: skip
    constants = {**_constants(call), "BLOCK_M": block_m, "STAGES": stages}
    row = _row_view(call, block_m)
    views = (q.view(block_m), k.view(block_n), v.view(block_n), do.view(block_m), row, row)
    return Aligned(backward_key_kernel, (tiles * count,), numbers, constants, views)
