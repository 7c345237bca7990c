"""Dropout's seeds, one by one and drawn together."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastformer.ops.random import draw_seed, drawn_together


def _seeds(device, count):
    return [int(draw_seed(device)) for _ in range(count)]


def test_drawn_together_repeats_with_the_generator_and_differs(device):
    found = []
    for _ in range(2):
        torch.manual_seed(1)
        with drawn_together(3):
            found.append(_seeds(device, 3))
        found[-1] += _seeds(device, 1)
    assert found[0] == found[1]
    assert len(set(found[0])) == 4


def test_one_draw_serves_as_many_as_were_announced_and_more_are_drawn_singly(device):
    torch.manual_seed(1)
    with drawn_together(2):
        together = _seeds(device, 3)
    torch.manual_seed(1)
    block = torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64, device=device)
    assert sorted(together[:2]) == sorted(block.tolist())
    assert together[2] == _seeds(device, 1)[0]


def test_nothing_is_drawn_for_a_layer_without_dropout(device):
    torch.manual_seed(1)
    before = torch.rand(1, device=device)
    torch.manual_seed(1)
    with drawn_together(3):
        pass
    assert torch.equal(torch.rand(1, device=device), before)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_part_draws_the_same_seed_again(device, reentrant):
    drawn = []

    def part(x):
        drawn.append(int(draw_seed(device)))
        return x.sin()

    x = torch.ones(2, device=device, requires_grad=True)
    with drawn_together(2):
        draw_seed(device)
        y = checkpoint(part, x, use_reentrant=reentrant)
    y.sum().backward()
    assert len(drawn) == 2
    assert drawn[0] == drawn[1]


def test_a_checkpointed_whole_draws_the_same_seeds_again(device):
    drawn = []

    def whole(x):
        with drawn_together(2):
            drawn.append(_seeds(device, 2))
        return x.sin()

    x = torch.ones(2, device=device, requires_grad=True)
    checkpoint(whole, x, use_reentrant=False).sum().backward()
    assert drawn[0] == drawn[1]
