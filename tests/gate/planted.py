"""Kernels with a known fault, on which the gate is tested, and a sound one beside them."""

import torch
import triton
import triton.language as tl


@triton.jit
def sound_kernel(x, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, mask=at < n, other=0.0) * 2, mask=at < n)


@triton.jit
def spilling_kernel(a, b, out, k, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    # One warp holds a 128 x 128 fp32 accumulator: 512 registers a thread, twice what any target has.
    rows, columns, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    accumulator = tl.zeros((M, N), tl.float32)
    for start in range(0, k, K):
        left = tl.load(a + rows[:, None] * k + (start + inner)[None, :])
        right = tl.load(b + (start + inner)[:, None] * N + columns[None, :])
        accumulator += tl.dot(left, right)
    tl.store(out + rows[:, None] * N + columns[None, :], tl.exp(accumulator))


@triton.jit
def oversized_kernel(a, b, out, k, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    # Pipelined tiles of 2 x 128 x 128 fp16 a stage: 64 KiB each, with more stages than any target has room for.
    rows, columns, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    accumulator = tl.zeros((M, N), tl.float32)
    for start in range(0, k, K):
        left = tl.load(a + rows[:, None] * k + (start + inner)[None, :])
        right = tl.load(b + (start + inner)[:, None] * N + columns[None, :])
        accumulator += tl.dot(left, right)
    tl.store(out + rows[:, None] * N + columns[None, :], accumulator)


def sound() -> None:
    x = torch.empty(1000, device="meta")
    sound_kernel[(4,)](x, torch.empty_like(x), 1000, BLOCK=256)


def spilling() -> None:
    a, b = torch.empty(128, 256, device="meta", dtype=torch.float16), torch.empty(256, 128, device="meta").half()
    spilling_kernel[(1,)](a, b, torch.empty(128, 128, device="meta"), 256, 128, 128, 32, num_warps=1, num_stages=1)


def oversized() -> None:
    a, b = torch.empty(128, 1024, device="meta", dtype=torch.float16), torch.empty(1024, 128, device="meta").half()
    oversized_kernel[(1,)](a, b, torch.empty(128, 128, device="meta"), 1024, 128, 128, 128, num_warps=8, num_stages=6)
