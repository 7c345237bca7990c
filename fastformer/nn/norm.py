"""LayerNorm and RMSNorm, alone and with residual + dropout in front of them as one module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastformer import ops
from fastformer.nn.counters import count_fallback, count_fused
from fastformer.nn.parts import has_hooks, runs, stands_for


@stands_for(torch.nn.LayerNorm)
class LayerNorm(torch.nn.LayerNorm):
    """torch.nn.LayerNorm (Ba et al. 2016, arXiv 1607.06450), same arguments, state_dict, results and errors."""

    def forward(self, input: Tensor) -> Tensor:
        reason = _why_not_fused(input, self.normalized_shape)
        if reason:
            count_fallback("LayerNorm", reason)
            return super().forward(input)
        count_fused("LayerNorm")
        if len(self.normalized_shape) == 1:
            return ops.layer_norm(input, self.weight, self.bias, self.eps)
        rows, weight, bias = _flatten(input, self.normalized_shape, self.weight, self.bias)
        return ops.layer_norm(rows, weight, bias, self.eps).view(input.shape)


@stands_for(torch.nn.RMSNorm)
class RMSNorm(torch.nn.RMSNorm):
    """torch.nn.RMSNorm (Zhang, Sennrich 2019, arXiv 1910.07467), same arguments, state_dict, results and errors."""

    def forward(self, x: Tensor) -> Tensor:
        reason = _why_not_fused(x, self.normalized_shape)
        if reason:
            count_fallback("RMSNorm", reason)
            return super().forward(x)
        count_fused("RMSNorm")
        if len(self.normalized_shape) == 1:
            return ops.rms_norm(x, self.weight, self.eps)
        rows, weight, _ = _flatten(x, self.normalized_shape, self.weight, None)
        return ops.rms_norm(rows, weight, self.eps).view(x.shape)


class AddLayerNorm(torch.nn.LayerNorm):
    """LayerNorm(residual + dropout(input)) in one pass, the end of a post-norm Transformer block.

    Args:
        normalized_shape: size of the last dimension.
        eps, elementwise_affine, bias, device, dtype: as torch.nn.LayerNorm.
        dropout: probability of zeroing an element of `input` while training.

    state_dict keys are torch.nn.LayerNorm's: weight, bias.

    Raises:
        ValueError: `normalized_shape` has several dimensions, or `dropout` is outside [0, 1].
    """

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        _check_add_norm(self.normalized_shape, dropout)
        self.dropout = dropout

    def forward(self, input: Tensor, residual: Tensor) -> Tensor:  # type: ignore[override]
        """[..., normalized_shape] twice; returns the normed sum, same shape."""
        count_fused("AddLayerNorm")
        return ops.add_layer_norm(
            input, residual, self.weight, self.bias, self.eps, dropout_p=self.dropout, training=self.training
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dropout={self.dropout}"


class AddRMSNorm(torch.nn.RMSNorm):
    """RMSNorm(residual + dropout(input)) in one pass.

    Args:
        normalized_shape: size of the last dimension.
        eps, elementwise_affine, device, dtype: as torch.nn.RMSNorm.
        dropout: probability of zeroing an element of `input` while training.

    state_dict keys are torch.nn.RMSNorm's: weight.

    Raises:
        ValueError: `normalized_shape` has several dimensions, or `dropout` is outside [0, 1].
    """

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        _check_add_norm(self.normalized_shape, dropout)
        self.dropout = dropout

    def forward(self, input: Tensor, residual: Tensor) -> Tensor:  # type: ignore[override]
        """[..., normalized_shape] twice; returns the normed sum, same shape."""
        count_fused("AddRMSNorm")
        return ops.add_rms_norm(input, residual, self.weight, self.eps, dropout_p=self.dropout, training=self.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dropout={self.dropout}"


def _check_add_norm(normalized_shape: tuple[int, ...], dropout: float) -> None:
    if len(normalized_shape) != 1:
        raise ValueError(f"normalized_shape must be one number, got {tuple(normalized_shape)}")
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"dropout must be between 0 and 1, got {dropout}")


def _why_not_fused(input: Tensor, normalized_shape: tuple[int, ...]) -> str:
    if input.is_nested:
        return "nested tensor"
    if input.shape[-len(normalized_shape) :] != normalized_shape or not input.is_floating_point():
        return "input that torch.nn refuses"
    return ""


def _flatten(
    input: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Several normalised dimensions as one."""
    return (
        input.flatten(-len(shape)),
        None if weight is None else weight.flatten(),
        None if bias is None else bias.flatten(),
    )


def is_plain_norm(module: torch.nn.Module) -> bool:
    """Whether a LayerNorm child may be read (weight, bias, eps) instead of called: no hook, no wrapper, no subclass."""
    return runs(module, LayerNorm) and len(_size(module)) == 1 and not has_hooks(module)


def _size(module: Any) -> tuple[int, ...]:
    return module.normalized_shape


def is_plain_dropout(module: torch.nn.Module) -> bool:
    """Whether a Dropout child may be read (p) instead of called."""
    return type(module) is torch.nn.Dropout and not has_hooks(module)
