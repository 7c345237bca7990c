"""One call of an attention kernel: its tensors, and the numbers every launcher derives from them."""

import math
from typing import Any

import torch
import triton
from torch import Tensor

_LOG2E = 1.0 / math.log(2.0)
_BOOL, _BYTE = torch.bool, torch.uint8


class Call:
    """What forward and backward launchers are given.

    Args:
        query: dense (B, H, Sq, D), or packed (T, H, D) with cu_q and cu_k; last stride 1.
        key, value: as query, with Hk heads; (…, D) and (…, Dv).
        cu_q, cu_k: int32 (B + 1,) boundaries of packed sequences, or None.
        max_q, max_k: longest packed sequences; ignored for dense calls.
        mask: bool or float, expanded to (B, H, Sq, Sk), or None.
        slopes: (H,) or (B, H), contiguous; sinks: (H,), contiguous; seed: int64 (1,); or None.
        dropout_p, causal, scale, bottom_right, left, right, softcap: as `fastformer.ops.attention.options.Options`.
        threshold: dropout's 32-bit threshold.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_q: Tensor | None,
        cu_k: Tensor | None,
        max_q: int,
        max_k: int,
        mask: Tensor | None,
        slopes: Tensor | None,
        sinks: Tensor | None,
        seed: Tensor | None,
        dropout_p: float,
        threshold: int,
        causal: bool,
        scale: float,
        bottom_right: bool,
        left: int,
        right: int,
        softcap: float,
    ) -> None:
        self.query, self.key, self.value = query, key, value
        self.cu_q, self.cu_k, self.slopes, self.sinks, self.seed = cu_q, cu_k, slopes, sinks, seed
        self.packed = cu_q is not None
        self.heads, self.kv_heads = query.shape[1], key.shape[1]
        self.head_dim, self.value_dim = query.shape[-1], value.shape[-1]
        if cu_q is not None:
            self.batch, self.q_len, self.k_len = cu_q.shape[0] - 1, max_q, max_k
        else:
            self.batch, self.q_len, self.k_len = query.shape[0], query.shape[2], key.shape[2]
        # A bool mask is read as bytes.
        self.mask = mask.view(_BYTE) if mask is not None and mask.dtype == _BOOL else mask
        self.mask_strides = (0, 0, 0, 0) if mask is None else mask.stride()
        self.slope_stride = slopes.shape[-1] if slopes is not None and slopes.ndim == 2 else 0
        self.scale = scale
        self.scales = (scale / softcap, softcap * _LOG2E) if softcap else (scale * _LOG2E, 1.0)
        # A side as long as the sequences bounds nothing; left in, it would overflow the kernels' 32-bit positions.
        left, right = (-1 if side >= max(self.q_len, self.k_len) else side for side in (left, right))
        # Causal rows may see nothing only if aligned with more queries than keys: that is a window, and treated as one.
        # Packed, the lengths are on the device; the same bounds make the same lengths.
        if causal and bottom_right and right < 0:
            uneven = cu_q.data_ptr() != cu_k.data_ptr() if cu_q is not None and cu_k is not None else False
            right = 0 if uneven or self.q_len > self.k_len else right
        self.left, self.right = left, right
        self.threshold = threshold
        self.keep_scale = 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0
        self.block_d = max(16, triton.next_power_of_2(self.head_dim))
        self.block_v = max(16, triton.next_power_of_2(self.value_dim))
        self.rich = (
            mask is not None or slopes is not None or dropout_p > 0.0 or softcap != 0.0 or left >= 0 or right >= 0
        )
        # Head dimensions that a program cannot hold. fp32 products run without matrix units and hold a whole head
        # dimension of both factors in registers.
        ruled = mask is not None or slopes is not None or left >= 0 or right >= 0 or dropout_p > 0.0
        longest = max(self.head_dim, self.value_dim)
        self.wide = longest > (64 if query.dtype == torch.float32 else 256) and (
            query.dtype == torch.float32 or longest > 512 or ruled or softcap != 0.0 or bottom_right
        )
        self.constants: dict[str, Any] = {
            "GROUP": self.heads // max(1, self.kv_heads),
            "BOTTOM_RIGHT": bottom_right,
            "CAUSAL": causal,
            "LEFT": left >= 0,
            "RIGHT": right >= 0,
            "BOOL_MASK": mask is not None and mask.dtype == _BOOL,
            # A mask that is the same for all queries, as padding is: its keys need not even be read.
            "KEY_MASK": mask is not None and mask.stride(-2) == 0,
            "SOFTCAP": softcap != 0.0,
            "DROPOUT": dropout_p > 0.0,
            "HEAD_DIM": self.head_dim,
            "VALUE_DIM": self.value_dim,
            "BLOCK_D": self.block_d,
            "BLOCK_V": self.block_v,
            # fp32 is fp32: no TF32 rounding of the inputs.
            "PRECISION": "ieee",
        }

    def strides(self, x: Tensor) -> tuple[int, int, int]:
        """(batch, head, token) strides of a tensor laid out like query."""
        if self.packed:
            return 0, x.stride(1), x.stride(0)
        return x.stride(0), x.stride(1), x.stride(2)

    def empty_like(self, x: Tensor, last: int | None = None) -> Tensor:
        """Uninitialised tensor of x's shape (with another last dimension), tokens outside heads in memory."""
        last = x.shape[-1] if last is None else last
        if self.packed:
            return torch.empty((x.shape[0], x.shape[1], last), dtype=x.dtype, device=x.device)
        batch, heads, length = x.shape[:3]
        return torch.empty((batch, length, heads, last), dtype=x.dtype, device=x.device).transpose(1, 2)
