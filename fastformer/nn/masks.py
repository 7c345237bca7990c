"""torch.nn's attention masks: what they mean to the operators, and which of them are causal."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.modules.transformer import _detect_is_causal_mask
from torch.utils.weak import WeakIdKeyDictionary

# Masks made by generate_square_subsequent_mask, and their version when they were: an edit in place moves it on.
_made_causal: WeakIdKeyDictionary = WeakIdKeyDictionary()


def generate_square_subsequent_mask(
    sz: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """torch.nn.Transformer's causal mask, remembered: `is_causal_mask` knows it on any device without reading it.

    Args:
        sz: length of the sequence, in tokens.

    Returns:
        [sz, sz], 0 on and below the diagonal, -inf above (True above with dtype=torch.bool).
    """
    # The name in torch.nn takes None as the default of both.
    mask = torch.nn.Transformer.generate_square_subsequent_mask(sz, device=device, dtype=dtype)  # type: ignore[arg-type]
    if not torch.compiler.is_compiling() and not mask.is_inference():
        _made_causal[mask] = mask._version
    return mask


def made_causal(mask: Tensor) -> bool:
    """Whether this very tensor came from `generate_square_subsequent_mask` and was not edited since."""
    if torch.compiler.is_compiling() or mask.is_inference():
        return False
    return _made_causal.get(mask) == mask._version


def is_causal_mask(mask: Tensor | None, hint: bool | None, seqlen: int) -> bool:
    """Whether `mask` is exactly the causal mask of `seqlen` tokens, without waiting for a device.

    A hint of True is believed, as torch.nn believes it. Otherwise a mask on the CPU is looked at, and one on a device
    is known if `generate_square_subsequent_mask` of this package made it. A causal mask that is not known is still
    obeyed: it is then a mask like any other.
    """
    if hint or mask is None:
        return bool(hint)
    if mask.shape != (seqlen, seqlen) or not is_mask(mask) or is_tracing(mask):
        return False
    return _detect_is_causal_mask(mask, None, seqlen) if mask.device.type == "cpu" else made_causal(mask)


def is_mask(mask: Tensor) -> bool:
    """Whether torch.nn takes this dtype for a mask."""
    return mask.dtype == torch.bool or mask.is_floating_point()


def is_tracing(tensor: Tensor) -> bool:
    """Whether tensors have no data to read: under torch.compile, export, fake tensors, torch.func."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.maybe_current_level() is not None
        or torch.jit.is_tracing()
        or tensor.is_meta
    )


def merge_masks(
    key_padding_mask: Tensor | None, attn_mask: Tensor | None, batch: int, heads: int, dtype: torch.dtype
) -> Tensor | None:
    """torch.nn's two masks as the one that ops.scaled_dot_product_attention takes.

    Args:
        key_padding_mask: [batch, seqlen_k]; bool (True: ignore) or float (added).
        attn_mask: [seqlen_q, seqlen_k] or [batch * heads, seqlen_q, seqlen_k]; bool (True: ignore) or float (added).
        dtype: of a float mask that is made from a bool one.

    Returns:
        None, a bool mask (True: attend) or a float mask, broadcastable to [batch, heads, seqlen_q, seqlen_k]. It stays
        bool as long as both are, and [batch, 1, 1, seqlen_k] when only keys are padded.
    """
    padding = None if key_padding_mask is None else key_padding_mask[:, None, None, :]
    if attn_mask is not None and attn_mask.ndim == 3:
        attn_mask = attn_mask.unflatten(0, (batch, heads))
    masks = [m for m in (padding, attn_mask) if m is not None]
    if not masks:
        return None
    if all(m.dtype == torch.bool for m in masks):
        ignore = masks[0] if len(masks) == 1 else masks[0] | masks[1]
        return ~ignore
    added = [
        torch.zeros_like(m, dtype=dtype).masked_fill_(m, float("-inf")) if m.dtype == torch.bool else m for m in masks
    ]
    return added[0] if len(added) == 1 else added[0] + added[1]
