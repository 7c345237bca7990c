"""Counting the launches of a training step, stock and patched, and saying what is left to fuse."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastformer.integrations import patch, unpatch
from fastformer.launches import cost
from fastformer.launches.profiled import profiled
from fastformer.launches.tracing import Launch, tracing

PHASES = ("forward", "backward", "loop", "optimizer")


@dataclass(frozen=True)
class StepCount:
    """Kernel launches of one training step.

    Attributes:
        launches: every operator's, in order.
        host_reads: times the host reads a tensor's value before the optimizer, which on a GPU waits for it (where the
            profiler counts: times the host waits).
    """

    launches: list[Launch]
    host_reads: int

    @property
    def total(self) -> int:
        return sum(launch.kernels for launch in self.launches)

    def by(self, key: Callable[[Launch], Any]) -> Counter[Any]:
        """Kernels by whatever `key` says of a launch."""
        found: Counter[Any] = Counter()
        for launch in self.launches:
            found[key(launch)] += launch.kernels
        return found

    def by_phase(self) -> Counter[str]:
        """Kernels by "forward", "backward", "loop" and "optimizer"."""
        return self.by(lambda launch: launch.phase)

    def by_layer(self) -> Counter[tuple[str, str]]:
        """Kernels by (part of the model, phase); layers of a list are one part, "encoder.layer.*"."""
        return self.by(lambda launch: (_part(launch), launch.phase))

    def by_operator(self) -> Counter[str]:
        return self.by(lambda launch: launch.operator)


def _part(launch: Launch) -> str:
    if launch.phase in ("optimizer", "loop"):
        return f"({launch.phase})"
    numbered = re.match(r"(.*?\.)\d+(\.|$)", launch.module)
    if numbered:
        return f"{numbered[1]}*"
    return ".".join(launch.module.split(".")[:2]) or "(model)"


def count_launches(model: torch.nn.Module, step: Callable[[], Any]) -> StepCount:
    """Count the kernel launches of `step()`: forward, backward, optimizer, in any loop.

    On a GPU PyTorch's profiler counts what the step launches. On the CPU the step runs as a GPU would run it (sm_90,
    PyTorch's fused attention and dropout); results of fastformer's operators are then not computed, so parameters are
    to be thrown away afterwards.

    Args:
        model: on the CPU or one GPU, stock or patched; its modules name the parts.
        step: runs a training step of it, not the first, which compiles and sets up.

    Raises:
        TypeError: model is not a torch.nn.Module.
        ValueError: it is on another device, or on several.
        RuntimeError: on the CPU: Triton is missing, or in interpreter mode.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    devices = {p.device for p in model.parameters()}
    if len(devices) > 1 or any(device.type not in ("cpu", "cuda") for device in devices):
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"model must be on the CPU or one GPU to be counted, got parameters on {names}")
    if any(device.type == "cuda" for device in devices):
        return StepCount(*profiled(model, step, devices.pop()))
    with tracing(model) as tracer:
        step()
    return StepCount(tracer.launches, tracer.host_reads)


def training_step(
    model: torch.nn.Module, clip: bool, autocast: torch.dtype | None, **optimizer: Any
) -> Callable[[dict[str, Tensor]], None]:
    """A step of the ordinary loop with AdamW: forward, under autocast if asked, backward, gradient clipping if asked,
    update."""
    device = next(model.parameters()).device.type
    chosen = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, **optimizer)

    def step(batch: dict[str, Tensor]) -> None:
        chosen.zero_grad()
        with torch.autocast(device, autocast, enabled=autocast is not None):
            loss = getattr(model(**batch), "loss", None)
        if loss is None:
            raise ValueError(f"batch must make {type(model).__name__} return a loss, got none: labels are missing")
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        chosen.step()

    return step


@dataclass(frozen=True)
class Comparison:
    """Launches of a step, stock and patched. Print it."""

    model: str
    stock: StepCount
    patched: StepCount
    where: str = "as a GPU would launch them"

    def left(self) -> list[tuple[str, str, str, int]]:
        """(part, phase, operator, launches) of what a patched step launches, in the order of the step."""
        found = self.patched.by(lambda launch: (_part(launch), launch.phase, launch.operator))
        return [(*place, number) for place, number in found.items()]

    @property
    def share(self) -> float:
        """Patched launches as a share of stock's."""
        return self.patched.total / self.stock.total

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("", "stock", "", "patched", ""), ("", *PHASES[:2], *PHASES[:2])]
        layers = [self.stock.by_layer(), self.patched.by_layer()]
        for part in dict.fromkeys(part for found in layers for part, _ in found if not part.startswith("(o")):
            if part != "(loop)":
                rows.append((part, *(str(found[part, phase]) for found in layers for phase in PHASES[:2])))
        phases = [self.stock.by_phase(), self.patched.by_phase()]
        rows.append(("in all", *(str(found[phase]) for found in phases for phase in PHASES[:2])))
        for phase, name in (("loop", "clipping"), ("optimizer", "optimizer")):
            rows.append((name, str(phases[0][phase]), "", str(phases[1][phase]), ""))
        rows.append(("the step", str(self.stock.total), "", str(self.patched.total), f"{self.share:.0%}"))
        rows.append(("host reads", str(self.stock.host_reads), "", str(self.patched.host_reads), ""))
        width = max(len(row[0]) for row in rows) + 2
        lines = [f"Kernel launches of one training step of {self.model}, {self.where}"]
        lines += [row[0].ljust(width) + "".join(cell.rjust(10) for cell in row[1:]) for row in rows]
        lines.append("left when patched, and why:")
        for part, phase, name, number in self.left():
            where = f"{part}, {phase}" if part not in ("(loop)", "(optimizer)") else part.strip("()")
            shown = name.removeprefix("fastformer::")
            lines.append(f"{number:>6}  {where}: {shown} ({cost.reason(name, phase)})")
        return "\n".join(lines)


def compare(
    model: torch.nn.Module, batch: dict[str, Tensor], clip: bool = True, autocast: torch.dtype | None = None
) -> Comparison:
    """Launches of a training step of `model`, stock and patched; its parameters are spoilt.

    Stock updates by AdamW as PyTorch runs it on a GPU by default (multi-tensor), patched by its fused AdamW.

    Args:
        model: a stock model in training mode, on the CPU or one GPU.
        batch: arguments of a call that returns a loss.
        clip: whether the loop clips gradients.
        autocast: dtype of autocast around forward, or None; then parameters are float32.

    Raises:
        TypeError, ValueError, RuntimeError: as `count_launches`.
    """
    unpatch(model)
    stock = _count(model, batch, training_step(model, clip, autocast, foreach=True))
    patch(model)
    patched = _count(model, batch, training_step(model, clip, autocast, fused=True))
    unpatch(model)
    device = next(model.parameters()).device
    where = "as a GPU would launch them" if device.type == "cpu" else f"as {device} launched them"
    return Comparison(type(model).__name__, stock, patched, where)


def _count(model: torch.nn.Module, batch: dict[str, Tensor], step: Callable[[dict[str, Tensor]], None]) -> StepCount:
    """Launches of a step that is not the first, which makes optimizer state and moves parameters."""
    first, second = ({name: value.clone() for name, value in batch.items()} for _ in range(2))
    step(first)
    return count_launches(model, lambda: step(second))
