"""Adaptive compression in several processes, over gloo on the CPU."""

import os
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fastformer.compress import AdaptiveCompressor

WORLD = 2


def decide_together(rank, rendezvous):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD)
    try:
        torch.manual_seed(0)
        model = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(8, 2, 32, dropout=0.0), 2)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        compressor = AdaptiveCompressor(model, optimizer, standard_error=0.001, patience=1, multiple_of=4, recovery=1)
        torch.manual_seed(rank)
        # Rank 1 sees other gradients (no DDP evens them out) and another metric, which would reject.
        for metric in (0.8, 0.8, 0.8, 0.8 if rank == 0 else 0.1):
            model(torch.randn(3, 2, 8)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            compressor.update(metric)
        mine = [[e.decision for e in compressor.history], [mask.tolist() for mask in compressor.pruner.kept]]
        theirs = [None] * WORLD
        dist.all_gather_object(theirs, mine)
        assert theirs[0] == theirs[1]
        assert mine[0] == ["train", "converged", "accept", "accept"]
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_rank_0_decides_for_all():
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(decide_together, (os.path.join(folder, "rendezvous"),), nprocs=WORLD)
