"""Encoder, decoder and encoder-decoder with torch.nn's interface, run without their padding."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from fastformer.nn.cache import KVCache
from fastformer.nn.counters import count_fallback, count_fused, count_host_read
from fastformer.nn.layers import TransformerDecoderLayer, TransformerEncoderLayer, why_not_packed
from fastformer.nn.masks import generate_square_subsequent_mask, is_causal_mask, is_mask, is_tracing
from fastformer.nn.norm import LayerNorm, RMSNorm
from fastformer.nn.packed import hooked, rebuild_nested, unbind_nested, unwrap
from fastformer.nn.parts import runs, runs_ours, stands_for, use_our_parts
from fastformer.ops.packing import Packing


@stands_for(torch.nn.TransformerEncoder)
class TransformerEncoder(torch.nn.TransformerEncoder):
    """torch.nn.TransformerEncoder: same arguments, state_dict and results, without computing on padding.

    With a bool src_key_padding_mask the batch is packed before the first layer and padded after the last, in training
    as in inference; outputs at padded places are zero (torch.nn leaves some number there in training and zero in
    inference). Set `fastformer_unpad = False` on the instance, or pass unpad=False, to keep the padding.
    """

    fastformer_unpad = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        use_our_parts(self.layers)

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Any = None,
        is_causal: bool | None = None,
        *,
        unpad: bool | None = None,
    ) -> Tensor:
        """As torch.nn's.

        Args:
            src_key_padding_mask: Tensor or None as in torch.nn; a `Packing` says that src is packed, [rows, d_model],
                and so is then the result.
            unpad: overrules `fastformer_unpad` for this call.
        """
        if isinstance(src_key_padding_mask, Packing):
            count_fused("TransformerEncoder")
            return self._packed(src, src_key_padding_mask, bool(is_causal))
        if not all(runs_ours(unwrap(layer), TransformerEncoderLayer) for layer in self.layers):
            count_fallback("TransformerEncoder", "a layer of another class")
            return super().forward(src, mask, src_key_padding_mask, is_causal)
        if src.is_nested and mask is None and src_key_padding_mask is None and not self.why_not_packed():
            count_fused("TransformerEncoder")
            (flat,), (place,) = unbind_nested((src,))
            return rebuild_nested(self._packed(flat, place, False), src)
        first = _first_attention(self)
        batch_first = first.batch_first
        seqlen = 0 if src.is_nested else src.shape[0 if src.ndim == 2 or not batch_first else 1]
        is_causal = is_causal_mask(mask, is_causal, seqlen)
        if src_key_padding_mask is not None and (self.fastformer_unpad if unpad is None else unpad):
            reason = self.why_not_packed() or _why_not_batch(src, src_key_padding_mask, first)
            reason = reason or _why_not_causal(mask, is_causal)
            if not reason:
                count_fused("TransformerEncoder")
                (packing,) = _plan(src_key_padding_mask)
                if packing.has_padding:
                    packed = packing.pack(src if batch_first else src.transpose(0, 1))
                    out = packing.pad(self._packed(packed, packing, is_causal))
                    return out if batch_first else out.transpose(0, 1)
                src_key_padding_mask = None
            else:
                count_fallback("TransformerEncoder", f"padding stays: {reason}")
        else:
            count_fused("TransformerEncoder")
        for layer in self.layers:
            src = layer(src, src_mask=mask, is_causal=is_causal, src_key_padding_mask=src_key_padding_mask)
        return src if self.norm is None else self.norm(src)

    def _packed(self, x: Tensor, packing: Packing, is_causal: bool) -> Tensor:
        for layer in self.layers:
            x = layer(x, src_mask=None, is_causal=is_causal, src_key_padding_mask=packing)
        return x if self.norm is None else self.norm(x)

    def why_not_packed(self) -> str:
        """Reason why this instance cannot run without padding, or ""."""
        return _why_not_stack(self, TransformerEncoderLayer)


@stands_for(torch.nn.TransformerDecoder)
class TransformerDecoder(torch.nn.TransformerDecoder):
    """torch.nn.TransformerDecoder: same arguments, state_dict and results, without computing on padding.

    Padding goes from target and memory by their bool key padding masks, as `TransformerEncoder` does it, if tgt_mask is
    None or known to be causal (see `fastformer.nn.masks.is_causal_mask`) and there is no memory_mask.
    """

    fastformer_unpad = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        use_our_parts(self.layers)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Any = None,
        memory_key_padding_mask: Any = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
        *,
        cache: KVCache | None = None,
        unpad: bool | None = None,
    ) -> Tensor:
        """As torch.nn's.

        Args:
            tgt_key_padding_mask, memory_key_padding_mask: Tensor or None as in torch.nn; two `Packing`s say that tgt
                and memory are packed, [rows, d_model], and so is then the result.
            cache: incremental decoding: tgt holds only the tokens that follow those of earlier calls with this cache,
                and is causal; tgt_key_padding_mask, if any, covers all tokens so far.
            unpad: overrules `fastformer_unpad` for this call.

        Raises:
            ValueError: a cache comes with masks, or layers, that cannot honour it.
        """
        if isinstance(tgt_key_padding_mask, Packing) and isinstance(memory_key_padding_mask, Packing):
            count_fused("TransformerDecoder")
            return self._packed(tgt, memory, tgt_key_padding_mask, memory_key_padding_mask, bool(tgt_is_causal))
        reason = ""
        if not all(runs_ours(unwrap(layer), TransformerDecoderLayer) for layer in self.layers):
            if cache is not None:
                raise ValueError("cache needs decoder layers of fastformer.nn (or of torch.nn, patched)")
            reason = "a layer of another class"
        elif tgt_mask is not None and not is_mask(tgt_mask):
            reason = "input that torch.nn refuses"
        if reason:
            count_fallback("TransformerDecoder", reason)
            return super().forward(
                tgt,
                memory,
                tgt_mask,
                memory_mask,
                tgt_key_padding_mask,
                memory_key_padding_mask,
                tgt_is_causal,
                memory_is_causal,
            )
        if cache is not None:
            if tgt_mask is not None or memory_mask is not None or memory_is_causal:
                raise ValueError("cache takes neither tgt_mask nor memory_mask: decoding is causal by itself")
            count_fused("TransformerDecoder")
            paddings = {
                "tgt_key_padding_mask": tgt_key_padding_mask,
                "memory_key_padding_mask": memory_key_padding_mask,
            }
            for number, layer in enumerate(self.layers):
                tgt = layer(tgt, memory, **paddings, cache=cache.of_layer(number))
            return tgt if self.norm is None else self.norm(tgt)
        first = _first_attention(self)
        batch_first = first.batch_first
        causal = is_causal_mask(tgt_mask, tgt_is_causal, tgt.shape[0 if tgt.ndim == 2 or not batch_first else 1])
        padded = tgt_key_padding_mask is not None or memory_key_padding_mask is not None
        if padded and (self.fastformer_unpad if unpad is None else unpad):
            reason = self.why_not_packed() or _why_not_batch(tgt, tgt_key_padding_mask, first)
            reason = reason or _why_not_batch(memory, memory_key_padding_mask, first)
            reason = reason or _why_not_causal(tgt_mask, causal) or _why_not_memory(memory_mask, memory_is_causal)
            if not reason and tgt.shape[0 if batch_first else 1] != memory.shape[0 if batch_first else 1]:
                reason = "tgt and memory are not one batch"
            if not reason:
                count_fused("TransformerDecoder")
                own, other = _plan_pair(tgt, memory, tgt_key_padding_mask, memory_key_padding_mask, batch_first)
                if own.has_padding or other.has_padding:
                    if not batch_first:
                        tgt, memory = tgt.transpose(0, 1), memory.transpose(0, 1)
                    out = own.pad(self._packed(own.pack(tgt), other.pack(memory), own, other, causal))
                    return out if batch_first else out.transpose(0, 1)
                tgt_key_padding_mask = memory_key_padding_mask = None
            else:
                count_fallback("TransformerDecoder", f"padding stays: {reason}")
        else:
            count_fused("TransformerDecoder")
        for layer in self.layers:
            tgt = layer(
                tgt,
                memory,
                tgt_mask=tgt_mask,
                memory_mask=memory_mask,
                tgt_key_padding_mask=tgt_key_padding_mask,
                memory_key_padding_mask=memory_key_padding_mask,
                tgt_is_causal=causal,
                memory_is_causal=memory_is_causal,
            )
        return tgt if self.norm is None else self.norm(tgt)

    def _packed(self, x: Tensor, memory: Tensor, own: Packing, other: Packing, is_causal: bool) -> Tensor:
        for layer in self.layers:
            x = layer(x, memory, tgt_key_padding_mask=own, memory_key_padding_mask=other, tgt_is_causal=is_causal)
        return x if self.norm is None else self.norm(x)

    def why_not_packed(self) -> str:
        """Reason why this instance cannot run without padding, or ""."""
        return _why_not_stack(self, TransformerDecoderLayer)


@stands_for(torch.nn.Transformer)
class Transformer(torch.nn.Transformer):
    """torch.nn.Transformer: same arguments, initialisation, state_dict and results, without computing on padding.

    If src_key_padding_mask and memory_key_padding_mask are the same tensor, the memory goes to the decoder packed. If
    they are not, the encoder keeps its padding: the decoder would see what stands there.
    """

    fastformer_unpad = True
    generate_square_subsequent_mask = staticmethod(generate_square_subsequent_mask)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        given = inspect.signature(torch.nn.Transformer).bind(*args, **kwargs).arguments
        # A custom encoder or decoder is somebody else's and stays as it is.
        if given.get("custom_encoder") is None:
            use_our_parts(self.encoder)
        if given.get("custom_decoder") is None:
            use_our_parts(self.decoder)

    def forward(
        self,
        src: Tensor,
        tgt: Tensor,
        src_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        src_is_causal: bool | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """As torch.nn's."""
        reason = self._why_not_fused(src, tgt)
        if reason:
            count_fallback("Transformer", reason)
            return super().forward(
                src,
                tgt,
                src_mask,
                tgt_mask,
                memory_mask,
                src_key_padding_mask,
                tgt_key_padding_mask,
                memory_key_padding_mask,
                src_is_causal,
                tgt_is_causal,
                memory_is_causal,
            )
        count_fused("Transformer")
        hidden = memory_key_padding_mask is src_key_padding_mask
        if hidden and src_key_padding_mask is not None and self._unpads():
            axis = 1 if self.batch_first else 0
            src_causal = is_causal_mask(src_mask, src_is_causal, src.shape[axis])
            tgt_causal = is_causal_mask(tgt_mask, tgt_is_causal, tgt.shape[axis])
            if not (
                _why_not_batch(src, src_key_padding_mask, _first_attention(self.encoder))
                or _why_not_batch(tgt, tgt_key_padding_mask, _first_attention(self.decoder))
                or _why_not_causal(src_mask, src_causal)
                or _why_not_causal(tgt_mask, tgt_causal)
                or _why_not_memory(memory_mask, memory_is_causal)
            ):
                own, other = _plan_pair(tgt, src, tgt_key_padding_mask, src_key_padding_mask, self.batch_first)
                if not self.batch_first:
                    src, tgt = src.transpose(0, 1), tgt.transpose(0, 1)
                memory = self.encoder(other.pack(src), src_key_padding_mask=other, is_causal=src_causal)
                out = own.pad(
                    self.decoder(
                        own.pack(tgt),
                        memory,
                        tgt_key_padding_mask=own,
                        memory_key_padding_mask=other,
                        tgt_is_causal=tgt_causal,
                    )
                )
                return out if self.batch_first else out.transpose(0, 1)
        memory = self.encoder(
            src,
            mask=src_mask,
            src_key_padding_mask=src_key_padding_mask,
            is_causal=src_is_causal,
            unpad=None if hidden and self.fastformer_unpad else False,
        )
        return self.decoder(
            tgt,
            memory,
            tgt_mask=tgt_mask,
            memory_mask=memory_mask,
            tgt_key_padding_mask=tgt_key_padding_mask,
            memory_key_padding_mask=memory_key_padding_mask,
            tgt_is_causal=tgt_is_causal,
            memory_is_causal=memory_is_causal,
            unpad=None if self.fastformer_unpad else False,
        )

    def _why_not_fused(self, src: Tensor, tgt: Tensor) -> str:
        if not (runs_ours(self.encoder, TransformerEncoder) and runs_ours(self.decoder, TransformerDecoder)):
            return "a custom encoder or decoder"
        batch = 0 if self.batch_first else 1
        one_batch = src.ndim != 3 or tgt.ndim != 3 or src.shape[batch] == tgt.shape[batch]
        if not one_batch or not src.shape[-1] == tgt.shape[-1] == self.d_model:
            return "input that torch.nn refuses"
        return ""

    def _unpads(self) -> bool:
        """Whether memory may go from encoder to decoder packed."""
        encoder: Any = self.encoder
        decoder: Any = self.decoder
        return (
            self.fastformer_unpad
            and encoder.fastformer_unpad
            and decoder.fastformer_unpad
            and not hooked((encoder, decoder))
            and not (encoder.why_not_packed() or decoder.why_not_packed())
        )


def _first_attention(stack: Any) -> Any:
    return unwrap(stack.layers[0]).self_attn


def _why_not_stack(stack: Any, layer_class: type) -> str:
    """Reason why a stack's layers must not see packed tensors, or ""."""
    for layer in stack.layers:
        reason = why_not_packed(unwrap(layer), layer_class)
        if reason:
            return reason
    norm = stack.norm
    if norm is not None and not ((runs(norm, LayerNorm) or runs(norm, RMSNorm)) and len(norm.normalized_shape) == 1):
        return "norm does not work token by token"
    return "a hook would see packed tensors" if hooked((*stack.layers, *([] if norm is None else [norm]))) else ""


def _why_not_batch(x: Tensor, mask: Tensor | Packing | None, attention: Any) -> str:
    """Reason why `mask`, bool [batch, seqlen], does not say which tokens of x are real, or ""."""
    if x.is_nested or x.ndim != 3:
        return "nested or unbatched input"
    if is_tracing(x):
        return "the number of tokens is not known while compiling or tracing"
    if x.shape[-1] != attention.embed_dim:
        return "input that torch.nn refuses"
    shape = x.shape[:2] if attention.batch_first else (x.shape[1], x.shape[0])
    if mask is None:
        return ""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        return "a key padding mask is not bool"
    if mask.shape != shape or mask.device != x.device:
        return "input that torch.nn refuses"
    return ""


def _why_not_causal(mask: Tensor | None, causal: bool) -> str:
    """Reason why a self-attention's mask keeps tokens from being packed, or ""."""
    if mask is None:
        return "input that torch.nn refuses" if causal else ""
    return "" if causal else "the mask is not known to be causal (pass is_causal=True)"


def _why_not_memory(mask: Tensor | None, causal: bool) -> str:
    return "memory_mask" if mask is not None or causal else ""


def _plan(*masks: Any) -> list[Packing]:
    """Packings of bool key padding masks (True: no token)."""
    if masks[0].device.type != "cpu":
        count_host_read()
    return Packing.from_masks(*(~mask for mask in masks))


def _plan_pair(tgt: Tensor, memory: Tensor, own: Any, other: Any, batch_first: bool) -> tuple[Packing, Packing]:
    """Packings of target and memory, at least one of which has a mask."""
    planned = iter(_plan(*(mask for mask in (own, other) if mask is not None)))
    packings = []
    for x, mask in ((tgt, own), (memory, other)):
        shape = x.shape[:2] if batch_first else (x.shape[1], x.shape[0])
        packings.append(Packing.whole(shape[0], shape[1], x.device) if mask is None else next(planned))
    return packings[0], packings[1]
