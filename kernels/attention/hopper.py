"""Launchers of the Hopper kernels, and which calls they take."""

import torch
import triton
from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fastformer.kernels.attention.call import Call
from fastformer.kernels.attention.hopper_backward import backward_key_kernel
from fastformer.kernels.attention.hopper_forward import forward_kernel

BLOCK = 128  # rows of a program: queries in forward, keys in backward
# Head dimension: (tile of keys, stages). Two 16-bit buffers a stage beside the queries fit 227 KiB.
FORWARD = {64: (128, 3), 128: (128, 2), 256: (64, 2)}
# Triton 3.9 gives ptxas --regAllocOptLevel=2, with which wider tiles spill (36 to 40 bytes), and windows or softcap at
# head dimension 256 (496 bytes).
NEWER = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8)
if NEWER:
    FORWARD |= {64: (64, 4), 128: (64, 4)}
# Head dimension: (tile of queries, stages) of the dK and dV kernel. At 128 the two sums leave too few registers: with
# tiles of 32 queries 32 bytes spill.
BACKWARD_KEY = {64: (64, 3)}
# Of an H100's or H200's 50 MB, what keys and values may take while other data passes through.
_L2_BYTES = 24 << 20
_DTYPES = (torch.float16, torch.bfloat16)
_LAYOUT = NVMMASharedLayout(128, 16, 2)


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


def _planes(call: Call) -> list[_Plane] | None:
    """Query, key and value, or None for a call that the kernels do not take."""
    rules = call.mask is not None or call.slopes is not None or call.sinks is not None or call.constants["DROPOUT"]
    if rules or call.head_dim != call.value_dim or call.head_dim not in FORWARD:
        return None
    # The largest score is looked for before scaling; offsets within a tile of the output are 32-bit.
    if call.query.dtype not in _DTYPES or call.scales[0] <= 0.0 or BLOCK * call.heads * call.head_dim >= 2**31:
        return None
    if NEWER and call.head_dim == 256 and call.rich:
        return None
    if not (call.query.numel() and call.key.numel()):
        return None
    try:
        return [_Plane(x, call.strides(x)) for x in (call.query, call.key, call.value)]
    except ValueError:
        return None


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
    o_sb, o_sh, o_st = call.strides(out)
    l_sb, l_sh = (0, tokens) if call.packed else (call.heads * call.q_len, call.q_len)
    tiles = max(1, triton.cdiv(call.q_len, BLOCK))
    count = (call.batch + call.packed) * call.heads
    group = call.heads // call.kv_heads
    section = group * max(1, _L2_BYTES // (4 * max(1, call.k_len) * call.head_dim))
    q, k, v = planes
    forward_kernel[(tiles * count,)](
        q.descriptor(BLOCK), k.descriptor(block_n), v.descriptor(block_n), out, lse, call.cu_q, call.cu_k,
        *q.steps, *k.steps, *v.steps, o_sb, o_sh, o_st, l_sb, l_sh, tiles, call.heads, count, min(section, count),
        call.q_len, call.k_len, tokens, *call.scales, call.left, call.right,
        GROUP=group, BOTTOM_RIGHT=call.constants["BOTTOM_RIGHT"], CAUSAL=call.constants["CAUSAL"],
        LEFT=call.left >= 0, RIGHT=call.right >= 0, SOFTCAP=call.constants["SOFTCAP"], HEAD_DIM=call.head_dim,
        BLOCK_N=block_n, STAGES=stages, num_warps=4,
    )  # fmt: skip
    return out, lse


def hopper_backward_key(call: Call, lse: Tensor, delta: Tensor, grad_out: Tensor, dk: Tensor, dv: Tensor) -> bool:
    """Fills dk and dv, which have the same strides, or answers False for a call that these kernels do not take.

    Args:
        lse, delta: as the forward and dQ kernels leave them; contiguous. grad_out: like the output.
    """
    planes = _planes(call)
    if planes is None or call.head_dim not in BACKWARD_KEY:
        return False
    try:
        do = _Plane(grad_out, call.strides(grad_out))
    except ValueError:
        return False
    block_m, stages = BACKWARD_KEY[call.head_dim]
    q, k, v = planes
    l_sb, l_sh = (0, call.query.shape[0]) if call.packed else (call.heads * call.q_len, call.q_len)
    tiles = max(1, triton.cdiv(call.k_len, BLOCK))
    count = (call.batch + call.packed) * call.kv_heads
    backward_key_kernel[(tiles * count,)](
        q.descriptor(block_m), k.descriptor(BLOCK), v.descriptor(BLOCK), do.descriptor(block_m), lse, delta, dk, dv,
        call.cu_q, call.cu_k, *q.steps, *k.steps, *v.steps, *do.steps, *call.strides(dk), l_sb, l_sh, tiles,
        call.kv_heads, count, call.q_len, call.k_len, call.key.shape[0] if call.packed else 0, call.scale,
        *call.scales, call.left, call.right,
        GROUP=call.heads // call.kv_heads, BOTTOM_RIGHT=call.constants["BOTTOM_RIGHT"], CAUSAL=call.constants["CAUSAL"],
        LEFT=call.left >= 0, RIGHT=call.right >= 0, SOFTCAP=call.constants["SOFTCAP"], HEAD_DIM=call.head_dim,
        BLOCK_M=block_m, STAGES=stages, num_warps=4,
    )  # fmt: skip
    return True
