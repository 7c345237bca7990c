"""Launchers of the Hopper kernels, and which calls they take."""

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
_DTYPES = (torch.float16, torch.bfloat16)
_LAYOUT = NVMMASharedLayout(128, 16, 2)
_VECTOR = NVMMASharedLayout(0, 32, 1)

forward_kernel = by_rows.forward_kernel
backward_query_kernel = by_query.backward_query_kernel
backward_key_kernel = by_key.backward_key_kernel


class _Plane:
    """A tensor as a 2-D array of tokens: element 0 of a token's head lies in some row, at some column.

    Attributes:
        row_batch, row_head, column_head: what a sequence or head adds to the row, or a head to the column.
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
        if tensor.data_ptr() % 16 or token % 8 or (in_row and head % 8):
            raise ValueError
        self.row_batch = batch // token
        self.row_head, self.column_head = (0, head) if in_row else (head // token, 0)
        rows = (batches - 1) * self.row_batch + (heads - 1) * self.row_head + length
        width = (heads - 1) * self.column_head + size
        if max(rows, width, (batches + 1) * self.row_batch) >= 2**31 - 2**9:
            raise ValueError
        self.tensor, self.shape, self.pitch = tensor, [rows, width], token

    def descriptor(self, rows: int) -> TensorDescriptor:
        """For tiles of that many tokens."""
        return TensorDescriptor(self.tensor, self.shape, [self.pitch, 1], [rows, self.tensor.shape[-1]], _LAYOUT)

    @property
    def steps(self) -> tuple[int, int, int]:
        return self.row_batch, self.row_head, self.column_head


def _vector(x: Tensor, rows: int) -> TensorDescriptor:
    """Tiles of a contiguous tensor of one number a row."""
    return TensorDescriptor(x, [x.numel()], [1], [rows], _VECTOR)


def _planes(call: Call, grad_out: Tensor | None = None) -> list[_Plane] | None:
    """Query, key, value and the gradient of the output, or None for a call that the kernels do not take."""
    rules = call.mask is not None or call.slopes is not None or call.sinks is not None or call.constants["DROPOUT"]
    if rules or call.head_dim != call.value_dim or call.head_dim not in FORWARD:
        return None
    # The largest score is looked for before scaling; offsets within a tile of the output are 32-bit.
    if call.query.dtype not in _DTYPES or call.scales[0] <= 0.0 or BLOCK * call.heads * call.head_dim >= 2**31:
        return None
    if not (call.query.numel() and call.key.numel()):
        return None
    tensors = [call.query, call.key, call.value] + ([] if grad_out is None else [grad_out])
    try:
        return [_Plane(x, call.strides(x)) for x in tensors]
    except ValueError:
        return None


def _constants(call: Call) -> dict[str, Any]:
    names = ("GROUP", "BOTTOM_RIGHT", "CAUSAL", "LEFT", "RIGHT", "SOFTCAP", "HEAD_DIM")
    return {name: call.constants[name] for name in names} | {"num_warps": 4}


def _rows(call: Call) -> tuple[int, int]:
    """(batch, head) strides of the LSE and of delta."""
    return (0, call.query.shape[0]) if call.packed else (call.heads * call.q_len, call.q_len)


def _order(call: Call) -> tuple[int, int, int]:
    """(tiles of queries, planes, planes whose keys and values stay in L2 together)."""
    tiles = max(1, triton.cdiv(call.q_len, BLOCK))
    planes = (call.batch + call.packed) * call.heads
    section = call.constants["GROUP"] * max(1, _L2_BYTES // (4 * max(1, call.k_len) * call.head_dim))
    return tiles, planes, min(section, planes)


def hopper_forward(call: Call) -> tuple[Tensor, Tensor] | None:
    """Output and LSE as `attention_forward` returns them, or None for a call that these kernels do not take: masks,
    ALiBi, sinks, dropout, other dtypes or head dimensions, memory that TMA cannot address."""
    planes = _planes(call)
    if planes is None:
        return None
    query = call.query
    block_n, stages = FORWARD[call.head_dim] if not call.constants["SOFTCAP"] else (64, 2)
    tokens = query.shape[0] if call.packed else 0
    out = call.empty_like(query)
    rows = (call.heads, tokens) if call.packed else (call.batch, call.heads, call.q_len)
    lse = torch.empty(rows, dtype=torch.float32, device=query.device)
    tiles, count, section = _order(call)
    q, k, v = planes
    forward_kernel[(tiles * count,)](
        q.descriptor(BLOCK), k.descriptor(block_n), v.descriptor(block_n), out, lse, call.cu_q, call.cu_k,
        *q.steps, *k.steps, *v.steps, *call.strides(out), *_rows(call), tiles, call.heads, count, section,
        call.q_len, call.k_len, tokens, *call.scales, call.left, call.right,
        BLOCK_N=block_n, STAGES=stages, **_constants(call),
    )  # fmt: skip
    return out, lse


def hopper_backward_query(
    call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, delta: Tensor, dq: Tensor
) -> bool:
    """Fills dq and delta, or answers False for a call that these kernels do not take.

    Args:
        out, lse: as the forward kernel leaves them; lse and delta contiguous. grad_out: like the output.
        grad_lse: like lse, any strides, or None.
    """
    planes = _planes(call, grad_out)
    if planes is None:
        return False
    block_n, slots = QUERY[call.head_dim]
    tiles, count, section = _order(call)
    dl_strides: tuple[int, ...] = (0, 0, 0)
    if grad_lse is not None:
        dl_strides = (0, *grad_lse.stride()) if call.packed else grad_lse.stride()
    q, k, v, do = planes
    backward_query_kernel[(tiles * count,)](
        q.descriptor(BLOCK), k.descriptor(block_n), v.descriptor(block_n), do.descriptor(BLOCK), out, lse,
        grad_lse, delta, dq, call.cu_q, call.cu_k, *q.steps, *k.steps, *v.steps, *do.steps, *call.strides(out),
        *call.strides(dq), *_rows(call), *dl_strides, tiles, call.heads, count, section, call.q_len, call.k_len,
        call.query.shape[0] if call.packed else 0, call.scale, *call.scales, call.left, call.right,
        BLOCK_N=block_n, SLOTS=slots, **_constants(call),
    )  # fmt: skip
    return True


def hopper_backward_key(call: Call, lse: Tensor, delta: Tensor, grad_out: Tensor, dk: Tensor, dv: Tensor) -> bool:
    """Fills dk and dv, which have the same strides, or answers False for a call that these kernels do not take.

    Args:
        lse, delta: as the forward and dQ kernels leave them; contiguous. grad_out: like the output.
    """
    planes = _planes(call, grad_out)
    if planes is None or lse.numel() >= 2**31 or (lse.data_ptr() | delta.data_ptr()) % 16:
        return False
    block_m, stages = (NARROW_KEY if call.constants["SOFTCAP"] else KEY)[call.head_dim]
    q, k, v, do = planes
    block_n = BLOCK if call.head_dim <= 128 else BLOCK // 2
    tiles = max(1, triton.cdiv(call.k_len, block_n))
    count = (call.batch + call.packed) * call.kv_heads
    backward_key_kernel[(tiles * count,)](
        q.descriptor(block_m), k.descriptor(block_n), v.descriptor(block_n), do.descriptor(block_m),
        _vector(lse, block_m), _vector(delta, block_m), dk, dv, call.cu_q, call.cu_k, *q.steps, *k.steps, *v.steps,
        *do.steps, *call.strides(dk), *_rows(call), tiles, call.kv_heads, count, call.q_len, call.k_len,
        call.key.shape[0] if call.packed else 0, *call.scales, call.left, call.right,
        BLOCK_M=block_m, STAGES=stages, **_constants(call),
    )  # fmt: skip
    return True
