"""Saving compact models and loading them without the object that made them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from fastformer.compress.checking import check_model
from fastformer.compress.compacting import apply_description
from fastformer.compress.describing import ATTRIBUTE, description, put
from fastformer.compress.sharing import tie

DESCRIPTION_FILE, WEIGHTS_FILE = "compression.json", "compact_model.pt"


def save(model: torch.nn.Module, folder: str | Path) -> None:
    """Save a compact model: weights under their stock names, and the description of its sizes.

    A Hugging Face model is saved by its save_pretrained, the description inside config.json (Trainer's own checkpoints
    of it load as well). One with int8 weights, and any other module, is saved as a state_dict beside compression.json.
    Shared layers are written out, once each.

    Args:
        model: the model; patched or not.
        folder: made if it is missing.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
    """
    check_model(model)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    spec = description(model)
    pretrained: Any = model if hasattr(model, "save_pretrained") else None
    if pretrained is not None and not spec["int8"]:
        # Copies: the format refuses two names for one tensor, and stock loaders look for every name.
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()} if spec["shared"] else None
        pretrained.save_pretrained(folder, state_dict=weights)
        return
    (folder / DESCRIPTION_FILE).write_text(json.dumps(spec, indent=1), encoding="utf-8")
    torch.save(model.state_dict(), folder / WEIGHTS_FILE)
    if pretrained is not None:
        pretrained.config.architectures = [type(model).__name__]
        pretrained.config.save_pretrained(folder)


def load(folder: str | Path, model: torch.nn.Module | None = None, **kwargs: Any) -> torch.nn.Module:
    """Load what `save` (or save_pretrained of a compact model) wrote.

    Args:
        folder: where it was saved.
        model: for anything but a Hugging Face model: a new one of the original sizes, which is changed in place.
        kwargs: for Hugging Face's from_pretrained.

    Returns:
        The model, in evaluation mode.

    Raises:
        FileNotFoundError: the folder holds no saved model.
        ValueError: `model` is missing where it is needed, or is not the one that was saved.
    """
    folder = Path(folder)
    weights, sizes, config_file = folder / WEIGHTS_FILE, folder / DESCRIPTION_FILE, folder / "config.json"
    if not weights.exists() and not config_file.exists():
        raise FileNotFoundError(f"folder must hold a saved model, got {folder} without {weights.name} or config.json")
    if not weights.exists():
        return _load_pretrained(folder, config_file, kwargs)
    if kwargs:
        raise ValueError(f"{folder} was not saved by save_pretrained, so load takes no {sorted(kwargs)}")
    spec = json.loads(sizes.read_text(encoding="utf-8"))
    if model is None:
        if not config_file.exists():
            raise ValueError(f"model must be given for {folder}, which holds no Hugging Face configuration")
        cls = _model_class(config_file)
        model = cls(cls.config_class.from_pretrained(folder))
    assert model is not None
    if spec["int8"]:
        import torchao  # noqa: F401  (whose tensors the file holds)
    apply_description(model, spec)
    model.load_state_dict(torch.load(weights, weights_only=True), assign=True)
    if hasattr(model, "tie_weights"):
        model.tie_weights()  # type: ignore[operator]
    for path, first in spec["shared"].items():
        tie(model.get_submodule(path), first)
    return model.eval()


def _load_pretrained(folder: Path, config_file: Path, kwargs: dict[str, Any]) -> Any:
    cls = _model_class(config_file)
    spec = json.loads(config_file.read_text(encoding="utf-8")).get(ATTRIBUTE)
    if spec is None:
        return cls.from_pretrained(folder, **kwargs)

    # transformers' loader takes the shapes from the module the class makes: make it as small as it was saved.
    def __init__(self: Any, config: Any, *args: Any, **options: Any) -> None:
        cls.__init__(self, config, *args, **options)
        apply_description(self, {**spec, "shared": {}})

    compact = type(cls.__name__, (cls,), {"__init__": __init__, "__module__": cls.__module__})
    model = compact.from_pretrained(folder, **kwargs)  # type: ignore[attr-defined]
    model.__class__ = cls
    for path, first in spec["shared"].items():
        tie(model.get_submodule(path), first)
    put(model, spec)
    return model.eval()


def _model_class(config_file: Path) -> Any:
    import transformers

    names = json.loads(config_file.read_text(encoding="utf-8")).get("architectures") or []
    cls = getattr(transformers, names[0], None) if names else None
    if cls is None:
        raise ValueError(f"{config_file} must name a model class of transformers in architectures, got {names}")
    return cls
