"""Executes a kernel's module with simulated triton modules in place of the real ones."""

from __future__ import annotations

import builtins
import functools
import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from . import language

_language = language.language
_language.nvidia = SimpleNamespace(hopper=language.hopper)
_gluon = SimpleNamespace(language=_language, jit=language.jit, constexpr_function=language.constexpr_function)
_ROOT = SimpleNamespace(
    triton=SimpleNamespace(
        jit=language.jit, language=_language, experimental=SimpleNamespace(gluon=_gluon), cdiv=_language.cdiv
    )
)


def kernel(module: str, name: str, edit: Any = None) -> language.Function:
    """A jitted function of a module, simulated.

    Args:
        module: its dotted name; other modules of fastformer.kernels that it imports are simulated too.
        name: of the function.
        edit: changes the module's source before it is executed, to plant a fault; str -> str.
    """
    return (load(module) if edit is None else _execute(module, edit))[name]


@functools.cache
def load(module: str) -> dict[str, Any]:
    """The namespace of a simulated module."""
    return _execute(module, lambda source: source)


def _execute(module: str, edit: Any) -> dict[str, Any]:
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    path = Path(spec.origin)
    scope = {"__name__": module, "__builtins__": {**vars(builtins), "__import__": _import}}
    exec(compile(edit(path.read_text()), str(path), "exec"), scope)
    return scope


def _import(name: str, scope: Any = None, local: Any = None, wanted: Any = (), level: int = 0) -> Any:
    if name.split(".")[0] == "triton":
        found = functools.reduce(getattr, name.split("."), _ROOT)
        return found if wanted else _ROOT.triton
    if name == "fastformer.kernels.attention" and wanted:
        return SimpleNamespace(**{x: SimpleNamespace(**load(f"{name}.{x}")) for x in wanted})
    if name.startswith("fastformer.kernels."):
        return SimpleNamespace(**load(name))
    return builtins.__import__(name, scope, local, wanted, level)
