"""PyTorch's own cases for these modules (torch.testing's module_db), on ours: forward, backward, state_dict, reference.

Its cases of attention ask for weights, which says little about the path that training takes: they run without as well.
"""

import copy

import pytest
import torch
from nn_pairs import FORWARD, assert_same
from torch.testing._internal.common_modules import module_db

import fastformer.nn as fnn
from fastformer.nn.parts import STANDS_FOR

INFOS = {info.module_cls.__name__: info for info in module_db if info.module_cls in STANDS_FOR}
# Least number of cases a name must have, so that a database without them cannot pass for a pass.
LEAST = {
    "LayerNorm": 3,
    "RMSNorm": 3,
    "MultiheadAttention": 64,
    "TransformerEncoder": 35,
    "TransformerEncoderLayer": 35,
    "TransformerDecoderLayer": 67,
    "Transformer": 64,
}


def cases(info, dtype, training):
    torch.manual_seed(0)
    return info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=training)


def build(info, case, dtype):
    args, kwargs = case.constructor_input.args, dict(case.constructor_input.kwargs)
    if info.name != "nn.TransformerEncoder":
        kwargs["dtype"] = dtype
    modules = []
    for cls in (info.module_cls, STANDS_FOR[info.module_cls]):
        torch.manual_seed(1)
        modules.append(cls(*copy.deepcopy(args), **kwargs))
    return modules


def first(out):
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", INFOS)
def test_module_db(name, training, dtype):
    info = INFOS[name]
    found = cases(info, dtype, training)
    assert len(found) >= LEAST[name]
    for number, case in enumerate(found):
        stock, ours = build(info, case, dtype)
        stock.train(training)
        ours.train(training)
        assert list(stock.state_dict()) == list(ours.state_dict())
        ours.load_state_dict(stock.state_dict(), strict=True)
        stock.load_state_dict(ours.state_dict(), strict=True)
        args, kwargs = case.forward_input.args, case.forward_input.kwargs
        named = [n for n, v in kwargs.items() if isinstance(v, torch.Tensor) and v.requires_grad]
        inputs = [*args, *(kwargs[n] for n in named)]
        more = {"need_weights": False} if name == "MultiheadAttention" else {}

        def call(m, *tensors, count=len(args), named=named, kwargs=kwargs, more=more):
            again = dict(zip(named, tensors[count:], strict=True))
            return first(m(*tensors[:count], **{**kwargs, **again, **more}))

        # Outputs at a target's padding are zero in ours; everything else is compared.
        padding = kwargs.get("tgt_key_padding_mask")
        seen = None
        if name == "Transformer" and padding is not None:
            seen = ~padding if case.constructor_input.kwargs["batch_first"] else ~padding.T
        fnn.reset_count()
        assert_same(stock, ours, inputs, call, seen if args[0].ndim == 3 else None)
        ran = fnn.count().fused
        if name == "TransformerEncoder":
            assert ran["TransformerEncoderLayer"] == 2, f"case {number} did not run fused"
        else:
            assert ran[name] >= 1, f"case {number} did not run fused"
        if more:
            fnn.reset_count()
            with torch.no_grad():
                both = [m(*args, **kwargs) for m in (ours, stock)]
            assert fnn.count().fused == {name: 1}
            torch.testing.assert_close(*both, **FORWARD[dtype])
        if case.reference_fn is not None:
            want = case.reference_fn(ours, *args, **kwargs)
            got = ours(*args, **kwargs)
            if seen is not None:
                got, want = got[seen], want[seen]
            # Some references compute in float32 whatever they are given.
            torch.testing.assert_close(first(got), first(want), equal_nan=True, **FORWARD[torch.float32])


@pytest.mark.parametrize("name", INFOS)
def test_gradients_are_derivatives(name):
    """Some of the cases through gradcheck, which knows nothing of stock."""
    info = INFOS[name]
    for case in cases(info, torch.float64, True)[::9]:
        _, ours = build(info, case, torch.float64)
        kwargs = dict(case.forward_input.kwargs)
        if name == "MultiheadAttention":
            kwargs["need_weights"] = False
        named = [n for n, v in kwargs.items() if isinstance(v, torch.Tensor) and v.requires_grad]
        tensors = [*case.forward_input.args, *(kwargs[n] for n in named)]
        inputs = [*ours.parameters(), *tensors]

        def run(*_, ours=ours, kwargs=kwargs, args=case.forward_input.args):
            # gradcheck moves its inputs in place.
            return first(ours(*args, **kwargs))

        assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
