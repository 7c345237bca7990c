"""LayerNorm, and residual + dropout + LayerNorm as one module."""

from __future__ import annotations

import torch
from torch import Tensor

from fastformer import ops
from fastformer.nn.counters import count_fallback, count_fused


class LayerNorm(torch.nn.LayerNorm):
    """torch.nn.LayerNorm (Ba et al. 2016, arXiv 1607.06450), same arguments and state_dict.

    Normalising over more than the last dimension takes the stock arithmetic.
    """

    def forward(self, input: Tensor) -> Tensor:
        if len(self.normalized_shape) != 1:
            count_fallback("LayerNorm", "normalises over several dimensions")
            return super().forward(input)
        count_fused("LayerNorm")
        return ops.layer_norm(input, self.weight, self.bias, self.eps)


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
        if len(self.normalized_shape) != 1:
            raise ValueError(f"normalized_shape must be one number, got {normalized_shape}")
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"dropout must be between 0 and 1, got {dropout}")
        self.dropout = dropout

    def forward(self, input: Tensor, residual: Tensor) -> Tensor:  # type: ignore[override]
        """[..., normalized_shape] twice; returns the normed sum, same shape."""
        count_fused("AddLayerNorm")
        return ops.add_layer_norm(
            input, residual, self.weight, self.bias, self.eps, dropout_p=self.dropout, training=self.training
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dropout={self.dropout}"


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether somebody watches or changes this module's call, so that going around it would be noticed."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def is_plain_norm(module: torch.nn.Module) -> bool:
    """Whether a LayerNorm child may be read (weight, bias, eps) instead of called: no hook, no wrapper, no subclass."""
    return (
        type(module) in (torch.nn.LayerNorm, LayerNorm) and len(module.normalized_shape) == 1 and not has_hooks(module)
    )


def is_plain_dropout(module: torch.nn.Module) -> bool:
    """Whether a Dropout child may be read (p) instead of called."""
    return type(module) is torch.nn.Dropout and not has_hooks(module)
