"""`patch` and `unpatch`: a stock model, sped up in place and back.

- What to replace stands in one table a model family (`families/`): class path → behaviour. Class paths are strings, so
  nothing is imported that the model has not imported itself.
- Every instance gets a class of its own (`swap`), so a second model of the same class is never touched.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field

import torch

from fastformer.integrations import families
from fastformer.integrations.packed_linear import separate
from fastformer.integrations.swap import UNDO, is_swapped, restore, swap

OLDEST_TRANSFORMERS, NEWEST_TRANSFORMERS = (4, 57), (5, 23)
UNPAD_CHOICES = ("auto", True, False)


@dataclass
class PatchReport:
    """What `patch` changed, what it left as it was, and why.

    Attributes:
        model: class name of the model.
        replaced: (module path, what it does now) for every module that got a new forward.
        skipped: (module path, reason) for what a family's table names but could not be replaced.
        unpad: whether padding is removed, and at what price.
        notes: remarks that hold for the whole model.
    """

    model: str
    replaced: list[tuple[str, str]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    unpad: str = "no padding to remove"
    notes: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.replaced)

    def __str__(self) -> str:
        lines = [f"fastformer patch of {self.model}: {len(self.replaced)} modules"]
        lines += [f"  {n:>4} × {what}" for what, n in Counter(what for _, what in self.replaced).items()]
        lines.append(f"  padding: {self.unpad}")
        lines += [f"  left as it was: {path or 'the model'}: {why}" for path, why in self.skipped]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def patch(model: torch.nn.Module, unpad: str | bool = "auto", fused_loss: bool = False) -> PatchReport:
    """Speed up a stock Hugging Face or torch.nn model in place.

    Parameters, state_dict keys, hooks and outputs stay what they are; only forward methods of this one instance change,
    and `unpatch` undoes that. Patching twice is the same as patching once with the later options.

    Args:
        model: the model, or any part of it.
        unpad: remove padding for the whole model where the family allows it. True does it whenever a batch comes with
            a mask that has padding; outputs at padded positions are zero then. "auto" does it too, unless a row of an
            encoder's batch begins with padding: heads that pool the first place would read such a zero. False keeps
            padded tensors (for a model whose outputs at padded positions are used).
        fused_loss: compute the loss of a language model's head (causal, masked or behind an encoder-decoder) from its
            hidden states, so that the logits of a batch never exist: same loss and gradients, but the output's `logits`
            is None while the model is in training mode and gets labels. In evaluation they are there.

    Returns:
        A report; print it. It is falsy if nothing was replaced.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
        ValueError: `unpad` is not "auto", True or False, or `fused_loss` not True or False.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if unpad not in UNPAD_CHOICES:
        raise ValueError(f'unpad must be "auto", True or False, got {unpad!r}')
    if fused_loss not in (True, False):
        raise ValueError(f"fused_loss must be True or False, got {fused_loss!r}")
    unpatch(model)
    report = PatchReport(type(model).__name__)
    output_layers: set[torch.nn.Module] = set()
    unsupported = _read_version(report)
    unpads = False
    owners: list[tuple[str, bool]] = []
    for path, module in model.named_modules():
        in_transformers = _is_transformers(module) or any(_below(path, root) for root, owns in owners)
        if unsupported and in_transformers:
            continue
        norms_owned = any(owns and _below(path, root) for root, owns in owners)
        rule = families.rule_for(module, in_transformers, norms_owned)
        if module in output_layers:
            rule = families.losses.OUTPUT_LAYER
        elif fused_loss and (linear := families.losses.linear_rule(module)) is not None:
            why_not = linear.reason_against(module)
            if why_not:
                report.skipped.append((path, f"its loss takes logits: {why_not}"))
            else:
                rule = linear
                output_layers.add(module.get_output_embeddings())
        reason = "" if rule is None else rule.reason_against(module)
        if _is_transformers(module):
            owners.append((path, rule is not None and rule.owns_norms and not reason))
        if rule is None:
            base = families.known_base(module)
            if base:
                report.skipped.append((path, f"{type(module).__name__} derives from {base} and may compute otherwise"))
            continue
        if reason:
            report.skipped.append((path, reason))
            continue
        swap(module, rule.behaviour)
        report.replaced.append((path, rule.what))
        if rule.removes_padding:
            unpads = True
            # An ordinary attribute: it travels with deepcopy and pickle, and unpatch takes it away.
            module.fastformer_unpad = unpad
    if fused_loss and not output_layers and not unsupported:
        report.notes.append("fused_loss: found no language model's head whose loss can do without logits")
    if unpads:
        report.unpad = (
            "removed for the whole encoder (one host read a batch when the mask is on a GPU)"
            if unpad is not False
            else "kept, as asked by unpad=False"
        )
    elif owners and report.replaced:
        report.notes.append(f"{report.model} is of no family whose padding can be removed: attention and norms only")
    if not report.replaced and not report.skipped and not unsupported:
        report.notes.append("no part of it is known; supported: " + ", ".join(families.NAMES))
    return report


def _is_transformers(module: torch.nn.Module) -> bool:
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(module, transformers.PreTrainedModel)


def _below(path: str, root: str) -> bool:
    return not root or path == root or path.startswith(f"{root}.")


def _read_version(report: PatchReport) -> bool:
    """Whether the installed transformers is too old; says so, or that it is newer than what was tested."""
    transformers = sys.modules.get("transformers")
    if transformers is None:
        return False
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if version < OLDEST_TRANSFORMERS:
        report.notes.append(f"transformers {transformers.__version__} is older than 4.57: nothing of it is patched")
        return True
    if version > NEWEST_TRANSFORMERS:
        report.notes.append(f"transformers {transformers.__version__} is newer than 5.23, the newest tested")
    return False


def unpatch(model: torch.nn.Module) -> int:
    """Undo `patch`, leaving no trace.

    Returns:
        Number of modules that were restored; 0 if the model was not patched.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    restored = 0
    for module in model.modules():
        if UNDO in type(module).__dict__:
            type(module).__dict__[UNDO](module)
        if is_swapped(module):
            restore(module)
            separate(module)
            module.__dict__.pop("fastformer_unpad", None)
            restored += 1
    return restored
