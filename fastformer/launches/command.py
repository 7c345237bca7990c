"""`fastformer info --step MODEL`."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch

from fastformer.demo.errors import UserError
from fastformer.launches.cost import reason
from fastformer.launches.step import PHASES, Comparison, compare

_LENGTHS = (16, 9, 12, 5)  # tokens of the sequences of the batch that is counted


def run(name: str, layers: int | None, as_json: bool, dtype: str, autocast: str | None) -> int:
    """Count on a GPU if there is one, and print a table or JSON. Returns the exit code.

    Args:
        name: a checkpoint or a family. layers: of a family. dtype, autocast: names of the parameters' dtype and of
            autocast's, None without it.

    Raises:
        UserError: there is no such model, or nothing to count with.
    """
    if importlib.util.find_spec("transformers") is None:
        raise UserError('counting needs transformers: pip install "fastformer[transformers]"')
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = dtype if autocast is None else f"{dtype}, autocast to {autocast}"
    print(f"fastformer info: making {name} ({kind}) and running its steps on {device}", file=sys.stderr, flush=True)
    model = _model(name, layers).to(device, getattr(torch, dtype))
    try:
        batch = {key: value.to(device) for key, value in _batch(model).items()}
        found = compare(model, batch, autocast=None if autocast is None else getattr(torch, autocast))
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{name}: {error}".rstrip(".")) from None
    print(json.dumps(as_dict(found), indent=1) if as_json else found)
    return 0


def _model(name: str, layers: int | None) -> Any:
    """A classifier, or a causal language model where the family has none."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    if name in _families():
        config = AutoConfig.for_model(name)
        if layers is not None:
            config.num_hidden_layers = layers
        config.use_cache = False
        torch.manual_seed(0)
        for kind in (AutoModelForSequenceClassification, AutoModelForCausalLM):
            if type(config) in kind._model_mapping:
                if getattr(config, "pad_token_id", None) is None:
                    config.pad_token_id = 0
                return kind.from_config(config).train()
        raise UserError(f"{name} is no family of text classifiers or causal language models")
    if layers is not None:
        raise UserError("--layers is for families; a checkpoint has the layers it has")
    if not Path(name).is_dir() and "/" not in name:
        raise UserError(f"{name} is neither a folder with a checkpoint nor a family of transformers")
    try:
        return AutoModelForSequenceClassification.from_pretrained(name).train()
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: {str(error).splitlines()[0].rstrip('.')}") from None


def _families() -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return CONFIG_MAPPING_NAMES


def _batch(model: Any) -> dict[str, torch.Tensor]:
    longest = max(_LENGTHS)
    mask = (torch.arange(longest) < torch.tensor(_LENGTHS)[:, None]).long()
    ids = torch.randint(5, model.config.get_text_config().vocab_size, mask.shape) * mask
    ids[mask == 0] = model.config.pad_token_id or 0
    causal = type(model).__name__.endswith("LMHeadModel") or "CausalLM" in type(model).__name__
    labels = torch.where(mask != 0, ids, -100) if causal else torch.zeros(len(_LENGTHS), dtype=torch.long)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def as_dict(found: Comparison) -> dict[str, Any]:
    """For JSON: launches by phase, by part and by operator, stock and patched, and the patched ones with reasons."""
    result: dict[str, Any] = {"model": found.model, "counted": found.where, "share": found.share}
    result["left"] = [
        {"part": part, "phase": phase, "operator": name, "launches": n, "reason": reason(name, phase)}
        for part, phase, name, n in found.left()
    ]
    for name, count in (("stock", found.stock), ("patched", found.patched)):
        phases, layers = count.by_phase(), count.by_layer()
        result[name] = {
            "launches": count.total,
            "host_reads": count.host_reads,
            "phases": {phase: phases[phase] for phase in PHASES},
            "parts": [{"part": part, "phase": phase, "launches": n} for (part, phase), n in layers.items()],
            "operators": dict(count.by_operator().most_common()),
        }
    return result
