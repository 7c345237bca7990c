"""The ahead-of-time compile gate: every launcher, with every configuration, compiled for every target, without a GPU.

Run it from the repository's root:

    python -m tests.gate                      # all cases, all targets, the installed Triton
    python -m tests.gate --triton 3.6.0       # the same on the Triton under build/triton-3.6.0 (tools/triton.sh 3.6.0)
    python -m tests.gate -k norm              # cases whose name contains "norm"
    python -m tests.gate --target sm_90       # one target (may be given several times)
    python -m tests.gate --share 3            # every third case a target, another third on the next target

It prints one line a kernel of a case (registers, spill bytes, shared memory, warps, stages), a summary, and exits 1 if
anything failed. What fails a case: an exception, no kernel compiled, spilled registers, scratch memory, more shared
memory (or tensor memory) than the target has, ptxas saying that wgmma instructions are serialised, and a
warp-specialised kernel without wgmma, TMA, overlap or the registers that its partitions ask for.

Cases: every `tests/gate/cases_<name>.py` defines

    def cases() -> list[tuple[str, Callable[[], None]]]

A callable makes launcher calls on tensors of `device="meta"`. `cases` is called once for every target, with that target
assumed (`fastformer.kernels.targets.target_of` answers it), so a case that one target lacks can be left out there.
Results are cached on disk under build/gate, so a second run recompiles only what changed.
"""
