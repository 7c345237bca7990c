"""DDP and FSDP2 over gloo, on the CPU: the same gradients as one process, and padding still removed."""

import copy
import functools
import os
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import fastformer as ff
import fastformer.nn as fnn

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")

B, S, T, E, H = 4, 7, 5, 16, 2
WORLD = 2
SRC = torch.arange(S) >= torch.tensor([7, 3, 5, 2])[:, None]
TGT = torch.arange(T) >= torch.tensor([2, 5, 4, 1])[:, None]


def model():
    torch.manual_seed(0)
    stock = torch.nn.Transformer(E, H, 2, 2, 24, 0.0, batch_first=True)
    ff.patch(stock)
    return stock


def loss_of(module, rows):
    torch.manual_seed(1)
    src, tgt = torch.randn(B, S, E)[rows], torch.randn(B, T, E)[rows]
    src_padding, tgt_padding = SRC[rows], TGT[rows]
    out = module(
        src,
        tgt,
        tgt_mask=fnn.generate_square_subsequent_mask(T),
        src_key_padding_mask=src_padding,
        tgt_key_padding_mask=tgt_padding,
        memory_key_padding_mask=src_padding,
    )

    return out[~tgt_padding].square().sum()


def run(rank, rendezvous, body):
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD)
    try:
        body(rank)
    finally:
        dist.destroy_process_group()


def spawn(body):
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run, (os.path.join(folder, "rendezvous"), body), nprocs=WORLD)


def expected():
    whole = model()
    loss_of(whole, slice(None)).backward()
    return {name: p.grad / WORLD for name, p in whole.named_parameters()}


def share(rank):
    return slice(rank * B // WORLD, (rank + 1) * B // WORLD)


def data_parallel(rank):
    wrapped = torch.nn.parallel.DistributedDataParallel(model())
    fnn.reset_count()
    loss_of(wrapped, share(rank)).backward()
    assert not fnn.count().fallback
    for name, grad in expected().items():
        torch.testing.assert_close(wrapped.module.get_parameter(name).grad, grad, rtol=1e-4, atol=1e-5)


def fully_sharded(rank, own):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,))
    sharded = copy.deepcopy(model())
    if own:
        plain = sharded
        torch.manual_seed(0)
        sharded = fnn.Transformer(E, H, 2, 2, 24, 0.0, batch_first=True)
        sharded.load_state_dict(plain.state_dict())
    for layers in (sharded.encoder.layers, sharded.decoder.layers):
        for layer in layers:
            fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    fnn.reset_count()
    loss_of(sharded, share(rank)).backward()
    assert not fnn.count().fallback
    assert fnn.count().fused["Transformer"] == 1
    for name, grad in expected().items():
        got = dict(sharded.named_parameters())[name].grad.full_tensor()
        torch.testing.assert_close(got, grad, rtol=1e-4, atol=1e-5)


def test_data_parallel():
    spawn(data_parallel)


@pytest.mark.parametrize("own", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["patched", "ours"])
def test_fully_sharded(own):
    spawn(functools.partial(fully_sharded, own=own))
