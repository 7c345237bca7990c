"""Weight gradients, column sums and sums of partial rows of one launch, against matrix products in fp64."""

import pytest
import torch

T, COLUMNS = 67, 40
SIZES = ((70, 130), (16, 33), (129, 16))


@pytest.fixture(autouse=True)
def _needs_kernels(device, interpreting):
    if device.type != "cuda" and not interpreting:
        pytest.skip("a kernel without an operator of its own")


def _inside_nan(rows, columns, device, dtype=torch.float16):
    """(rows, columns) in the middle of NaN."""
    buffer = torch.full((rows + 2, columns + 24), torch.nan, dtype=dtype, device=device)
    view = buffer[1:-1, 8 : 8 + columns]
    return view.copy_(torch.randn(rows, columns))


@pytest.mark.parametrize(
    ("products", "sums", "partials", "factor", "result"),
    [
        (3, 2, 2, torch.float16, torch.float16),
        (1, 0, 0, torch.float16, torch.float16),
        (0, 3, 1, torch.float32, torch.float32),
        (0, 0, 2, torch.float16, torch.float16),
        (2, 1, 1, torch.float16, torch.float32),
    ],
)
def test_against_products_in_fp64(device, products, sums, partials, factor, result):
    from fastformer.kernels.gradients import parameter_gradients

    torch.manual_seed(0)

    def nan(*shape, dtype=result):
        return torch.full(shape, torch.nan, dtype=dtype, device=device)

    factors = [(_inside_nan(T, n, device, factor), _inside_nan(T, k, device, factor)) for n, k in SIZES]
    asked = [(dy, x, nan(dy.shape[1], x.shape[1])) for dy, x in factors[:products]]
    summed = [(dy, nan(dy.shape[1])) for dy, _ in factors[:sums]]
    halves = [
        (torch.randn(2 * rows, COLUMNS, device=device), *(nan(COLUMNS, dtype=torch.float32) for _ in range(2)))
        for rows in (3, 90)[:partials]
    ]
    parameter_gradients(asked, summed, halves)
    rough = {"rtol": 2e-3, "atol": 2e-2} if result == torch.float16 else {"rtol": 1e-5, "atol": 1e-4}
    for dy, x, dw in asked:
        torch.testing.assert_close(dw.double(), dy.double().t() @ x.double(), **rough)
    for dy, db in summed:
        torch.testing.assert_close(db.double(), dy.double().sum(0), **rough)
    for partial, first, second in halves:
        for part, found in zip(partial.chunk(2), (first, second), strict=True):
            torch.testing.assert_close(found, part.sum(0), rtol=1e-5, atol=1e-5)


def test_nothing_to_do_is_no_launch(monkeypatch):
    from fastformer.kernels import gradients

    monkeypatch.setattr(gradients, "_launch", None)
    gradients.parameter_gradients([], [], [])
