"""Several tensors cast in one launch, against a cast of each."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _needs_kernels(device, interpreting):
    if device.type != "cuda" and not interpreting:
        pytest.skip("a kernel without an operator of its own")


@pytest.mark.parametrize(
    ("shapes", "source", "dtype"),
    [
        ([(3, 5), (4096,), (1,), (2, 4097), (0, 7), (16,), (9000,), (8,)], torch.float32, torch.float16),
        ([(70, 130), (0,)], torch.float16, torch.float32),
        ([(0,)], torch.float32, torch.float16),
    ],
)
def test_equals_a_cast_of_each(device, shapes, source, dtype):
    from fastformer.kernels.casting import cast

    torch.manual_seed(0)
    tensors = [(torch.randn(shape, device=device) * 100).to(source) for shape in shapes]
    if tensors[0].numel():
        tensors[0].view(-1)[:3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    for found, given in zip(cast(tensors, dtype), tensors, strict=True):
        assert found.dtype == dtype
        assert torch.equal(found.nan_to_num(7.0), given.to(dtype).nan_to_num(7.0))
        assert torch.equal(found.isnan(), given.isnan())
