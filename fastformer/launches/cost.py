"""How many kernels PyTorch launches on a GPU for one of its operators.

One each, but for those below. Where an operator chooses between several implementations the smallest number is given,
so that a stock model never looks worse than it is. Read off ATen's CUDA sources of PyTorch 2.11 to 2.13.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

# Of tensors that are there already, or of memory alone.
_NOTHING = {
    "_local_scalar_dense",
    "_reshape_alias",
    "_unsafe_view",
    "alias",
    "detach",
    "empty",
    "empty_like",
    "empty_strided",
    "is_same_size",
    "promote_types",
    "lift_fresh",
    "_record_function_enter_new",
    "_record_function_exit",
    "new_empty",
    "new_empty_strided",
    "set_",
}
_SEVERAL = {
    "embedding_dense_backward": 2,  # zeros, then the sums
    "index_put_": 2,  # sorts indices where they may repeat
    "native_layer_norm_backward": 2,  # of the input; of weight and bias
    "nll_loss_backward": 2,  # zeros, then one place a row
    "scaled_dot_product_attention_backward": 2,  # rows' products of output and gradient; the three gradients
    "select_backward": 2,  # zeros, then the copy
}
_NORM_EXTRA = 2  # zeros for the blocks' sums before, the tensors' sums of those after
READS = {"_local_scalar_dense", "nonzero", "masked_select"}

# multi_tensor_apply: tensors a launch by number of lists, blocks a launch, elements a block.
_TENSORS, _BLOCKS, _CHUNK = (110, 64, 48, 36, 30), 320, 65536

# Why an operator that is left in a patched model is there; kernels of fastformer's under their own names.
REASONS = {
    "addmm": "matrix product, bias in its epilogue",
    "addmm_": "matrix product, adding to the gradient of the residual",
    "mm": "matrix product",
    "bmm": "matrix product",
    "sum": "gradient of a bias, or of a table read as a whole, outside the layers",
    "cat": "gradients of query, key and value side by side",
    "randint": "the seeds of all dropouts",
    "_to_copy": "rounded for autocast, or a gradient rounded back",
    "add_": "adding to the gradient of the residual, which is in another dtype",
    "add": "a gradient that arrives along two ways",
    "gelu": "activation",
    "gelu_backward": "activation",
    "tanh": "pooler's activation",
    "tanh_backward": "pooler's activation",
    "select_backward": "first tokens' gradient, among zeros",
    "_foreach_norm": "norms of all gradients at once",
    "_foreach_mul_": "clipping all gradients at once",
    "_foreach_add_": "step counts of all parameters at once",
    "_fused_adamw_": "all parameters at once",
    "_log_softmax": "loss",
    "_log_softmax_backward_data": "loss",
    "nll_loss_forward": "loss",
    "nll_loss_backward": "loss",
    "ones_like": "gradient of the loss",
    "zeros_like": "rows of a table that take no gradient",
    "embedding": "table lookup",
    "embedding_dense_backward": "gradient of a table, and its zeros",
    "native_dropout": "head's dropout",
    "native_dropout_backward": "head's dropout",
    "fastformer::packing.facts": "lengths of the sequences, for the host",
    "fastformer::packing.places": "where packed tokens come from",
    "fastformer::packing.move": "removing padding, and putting it back",
    "fastformer::embedding.number": "positions, which count tokens that are no padding",
    "fastformer::embedding.embed": "tables, norm and dropout",
    "fastformer::norm.forward_tile": "dropout, residual and norm",
    "fastformer::norm.backward_tile": "norm, residual and dropout",
    "fastformer::activation.forward": "bias and activation",
    "fastformer::activation.backward": "activation, or dropout",
    "fastformer::casting.cast": "input and parameters of a layer, rounded for autocast",
    "fastformer::gradients.gradients": "all weights, biases and norms of a layer",
    "fastformer::rows.sum_partials": "a norm's weight and bias",
}


def reason(name: str, phase: str) -> str:
    """Why an operator is left."""
    if phase == "loop":
        return REASONS[name] if name in ("_foreach_norm", "_foreach_mul_", "ones_like") else "clipping's factor"
    return REASONS.get(name, "fused" if name.startswith("fastformer::") else "around the layers")


def launches(schema: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> int:
    """Kernels that a call of an ATen operator launches.

    Args:
        schema: `OpOverload._schema`.
        args, kwargs, result: of the call.
    """
    name = schema.name.split("::")[1]
    writes = any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments)
    views = bool(schema.returns) and all(r.alias_info is not None for r in schema.returns) and not writes
    if name in _NOTHING or views:
        return 0
    lists = [a for a in args if isinstance(a, list | tuple) and a and all(isinstance(t, Tensor) for t in a)]
    if name.startswith(("_foreach_", "_fused_")):
        depth = 1 if name == "_foreach_norm" else len(lists) + (0 if writes else 1)
        if not lists:
            return 0
        extra = _NORM_EXTRA if name == "_foreach_norm" else 0
        return multi_tensor_launches([t.numel() for t in lists[0]], min(depth, 5)) + extra
    touched = [t for t in pytree.tree_leaves(args[:1] if writes else result) if isinstance(t, Tensor)]
    if touched and not any(t.numel() for t in touched):
        return 0
    return _SEVERAL.get(name, 1)


def multi_tensor_launches(sizes: Sequence[int], lists: int) -> int:
    """Launches of a multi-tensor operator.

    Args:
        sizes: elements of every tensor.
        lists: tensors it reads or writes for each of them, 1 to 5.
    """
    most, count, tensors, blocks = _TENSORS[lists - 1], 0, 0, 0
    for size in sizes:
        chunks = -(-size // _CHUNK)
        tensors += chunks > 0
        for chunk in range(1, chunks + 1):
            blocks += 1
            last = chunk == chunks
            if blocks == _BLOCKS or (last and tensors == most):
                count, blocks, tensors = count + 1, 0, 0 if last else 1
    return count + (blocks > 0)
