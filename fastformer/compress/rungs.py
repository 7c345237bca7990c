"""The further rungs of the ladder: low-rank factors and int8 weights.

Both work on the linear layers of attention and feed-forward (never on embeddings, heads of tasks or tied weights) of a
compact model, after training: they are tried on a copy and kept if the metric stays within the tolerance.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastformer.compress.checking import is_number
from fastformer.compress.describing import description, put
from fastformer.compress.sites import find_sites
from fastformer.integrations.swap import original_class

_READERS = (
    "torch.nn.modules.activation",
    "torch.nn.modules.transformer",
    "fastformer.nn.attention",
    "fastformer.nn.layers",
    "transformers.models.t5.modeling_t5",
)


class LowRankLinear(torch.nn.Module):
    """up(down(x)): a linear layer of lower rank, as two plain ones."""

    def __init__(self, linear: torch.nn.Linear, rank: int) -> None:
        super().__init__()
        place: Any = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        self.down = torch.nn.Linear(linear.in_features, rank, bias=False, **place)
        self.up = torch.nn.Linear(rank, linear.out_features, bias=False, **place)
        self.up.bias = linear.bias
        self.train(linear.training)
        self.requires_grad_(linear.weight.requires_grad)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


def linear_layers(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Linear]]:
    """The linear layers of attention and feed-forward that are called and not only read: (path, module), each once."""
    seen = set()
    for site in find_sites(model, trainable=False):
        for slot in site.slots:
            module = model.get_submodule(slot.module)
            if type(module) is torch.nn.Linear and not _is_read(model, slot.module) and slot.module not in seen:
                seen.add(slot.module)
                yield slot.module, module


def _is_read(model: torch.nn.Module, path: str) -> bool:
    """Whether the module around a linear layer reads its weight: torch.nn's own, and T5 its dtype."""
    parent = model.get_submodule(path.rpartition(".")[0])
    return original_class(parent).__module__ in _READERS


@torch.no_grad()
def low_rank(model: torch.nn.Module, energy: float) -> dict[str, int]:
    """Replace linear layers in place by the product of two, where that has fewer parameters.

    The factors are the truncated singular value decomposition, the best approximation in the Frobenius norm (Eckart
    and Young 1936).

    Args:
        model: the model.
        energy: share of the squared singular values to keep in each layer, between 0 and 1.

    Returns:
        Rank by path, of the layers that were replaced.

    Raises:
        ValueError: `energy` is not between 0 and 1, or the model has no linear layer that can be replaced.
    """
    if not is_number(energy) or not 0 < energy < 1:
        raise ValueError(f"energy must lie between 0 and 1, got {energy!r}")
    layers = list(linear_layers(model))
    if not layers:
        raise ValueError(f"model must have linear layers that can be replaced, got {type(model).__name__}")
    ranks = {}
    for path, linear in layers:
        u, s, vh = torch.linalg.svd(linear.weight.float(), full_matrices=False)
        share = s.square().cumsum(0) / s.square().sum()
        rank = min(int((share < energy).sum()) + 1, len(s))
        if rank * sum(linear.weight.shape) >= linear.weight.numel():
            continue
        root = s[:rank].sqrt()
        factorize(model, path, rank)
        replaced: Any = model.get_submodule(path)
        replaced.down.weight.copy_(root[:, None] * vh[:rank])
        replaced.up.weight.copy_(u[:, :rank] * root)
        ranks[path] = rank
    spec = description(model)
    spec["low_rank"].update(ranks)
    put(model, spec)
    return ranks


def factorize(model: torch.nn.Module, path: str, rank: int) -> None:
    """Put a `LowRankLinear` of the given rank in the place of a linear layer; its factors have yet to be set.

    Raises:
        ValueError: there is no plain linear layer at `path`.
    """
    linear: Any = model.get_submodule(path)
    if type(linear) is not torch.nn.Linear:
        raise ValueError(f"path must name a torch.nn.Linear, got {type(linear).__name__} at {path!r}")
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, LowRankLinear(linear, rank))


def quantize_int8(model: torch.nn.Module, dynamic: bool = False) -> int:
    """int8 weights, one scale an output row, by torchao, for the linear layers of attention and feed-forward.

    Args:
        model: a model in evaluation, changed in place.
        dynamic: also quantize activations, a scale a token, and multiply in int8.

    Returns:
        Number of layers quantized.

    Raises:
        ImportError: torchao is missing.
        ValueError: the model has no layer that can be quantized.
    """
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

    plain = {layer for _, layer in linear_layers(model)}
    for module in model.modules():
        if isinstance(module, LowRankLinear):
            plain |= {module.down, module.up}
    if not plain:
        raise ValueError(f"model must have linear layers that can be quantized, got {type(model).__name__}")
    config = Int8DynamicActivationInt8WeightConfig() if dynamic else Int8WeightOnlyConfig()
    quantize_(model, config, lambda module, path: module in plain)
    spec = description(model)
    spec["int8"] = True
    put(model, spec)
    return len(plain)
