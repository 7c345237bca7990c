"""The mechanism of a patch: giving one module instance another class.

- `swap(module, behaviour)` changes `module.__class__` to a subclass of its own class whose forward is `behaviour`'s.
  Parameters, buffers, hooks, children and state_dict keys stay what they were; no other instance is touched, and
  `restore` puts the class back, after which nothing tells that anything happened.
- The generated class carries the original's name, module and qualified name: Hugging Face keys registries by
  `str(type(model))` and writes the class name into config.json.
- Pickling and deepcopy go through `_rebuild`, which names the original class and the behaviour, both importable.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

ORIGINAL = "_fastformer_original_class"
# On a class that something else put over a swapped one: takes it off again.
UNDO = "_fastformer_undo"


@functools.cache
def _swapped_class(original: type, behaviour: type) -> type:
    # What a behaviour needs once a process; not in its forward, which torch.compile traces.
    prepare = getattr(behaviour, "_prepare", None)
    if prepare is not None:
        prepare()

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        _, arguments, *rest = super(swapped, self).__reduce_ex__(max(int(protocol), 2))
        return (_rebuild, (original, behaviour, *arguments[1:]), *rest)

    # Hugging Face reads signatures of forward (to drop unused columns, to fill defaults): keep the original's.
    @functools.wraps(original.forward)  # type: ignore[attr-defined]
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return behaviour.forward(self, *args, **kwargs)  # type: ignore[attr-defined]

    # By which a neighbour knows whose forward this is.
    forward.fastformer_behaviour = behaviour  # type: ignore[attr-defined]
    swapped: Any = type(
        original.__name__,
        (behaviour, original),
        {
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            "__doc__": original.__doc__,
            "__reduce_ex__": __reduce_ex__,
            "forward": forward,
            ORIGINAL: original,
        },
    )
    return swapped


def _rebuild(original: type, behaviour: type, *arguments: Any) -> Any:
    cls = _swapped_class(original, behaviour)
    return cls.__new__(cls, *arguments)


def swap(module: torch.nn.Module, behaviour: type) -> None:
    """Give `module` the forward of `behaviour`, a class that calls super().forward for the stock arithmetic."""
    module.__class__ = _swapped_class(original_class(module), behaviour)


def restore(module: torch.nn.Module) -> bool:
    """Undo `swap`; whether there was anything to undo."""
    if not is_swapped(module):
        return False
    module.__class__ = original_class(module)
    return True


def is_swapped(module: torch.nn.Module) -> bool:
    return ORIGINAL in type(module).__dict__


def original_class(module: torch.nn.Module) -> type:
    """The stock class of a module, swapped or not."""
    return type(module).__dict__.get(ORIGINAL, type(module))


def class_path(module: torch.nn.Module) -> str:
    """ "package.module.Class" of the stock class, by which family tables name what they replace."""
    cls = original_class(module)
    return f"{cls.__module__}.{cls.__qualname__}"
