"""The model and the tokenizer of the demo: small and new, or a Hugging Face checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastformer.tokenizer import BPETokenizer

from .encoder import SPECIAL_TOKENS, Encoder, checkpoint_encoder, one_line
from .errors import UserError

VOCAB_SIZE = 4096
HIDDEN = 128
LAYERS = 2


def new_tokenizer(texts: list[str], progress: Callable[[int], object]) -> BPETokenizer:
    """Byte-level BPE learned from the training passages; progress is called with the size of the vocabulary so far."""
    return BPETokenizer.train(iter(texts), VOCAB_SIZE, pattern="gpt2", special_tokens=SPECIAL_TOKENS, progress=progress)


def new_model(vocab_size: int, pad_id: int, names: list[str], max_length: int, seed: int) -> nn.Module:
    """A small BERT classifier with random weights."""
    from transformers import BertForSequenceClassification

    torch.manual_seed(seed)
    return BertForSequenceClassification(bert_config(vocab_size, pad_id, max_length, HIDDEN, LAYERS, **labels(names)))


def bert_config(vocab_size: int, pad_id: int, max_length: int, width: int, layers: int, **settings: Any) -> Any:
    """A configuration in BERT's proportions: heads of 64 (one narrower head below that), feed-forward 4x, dropout 0.1.

    width: of the hidden states, a multiple of 64 or less than 64; settings: more fields of a BertConfig.
    """
    from transformers import BertConfig

    return BertConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        intermediate_size=4 * width,
        max_position_embeddings=max_length,
        pad_token_id=pad_id,
        **settings,
    )


def load_checkpoint(
    name: str, tokenizer_name: str | None, names: list[str], max_length: int, seed: int
) -> tuple[nn.Module, Encoder]:
    """A Hugging Face checkpoint with a classification head for `names`, in fp32, and its tokenizer.

    Raises UserError where either cannot be loaded, or the model has fewer positions than max_length.
    """
    torch.manual_seed(seed)
    settings = {"problem_type": "single_label_classification", **labels(names)}
    model = load_model(name, "AutoModelForSequenceClassification", max_length, **settings)
    which = f"--tokenizer {tokenizer_name}" if tokenizer_name else f"the tokenizer of --model {name}"
    encoder = checkpoint_encoder(load_tokenizer(tokenizer_name or name, which), max_length)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = encoder.pad_id
    return model, encoder


def load_model(name: str, kind: str, max_length: int, **settings: Any) -> Any:
    """A Hugging Face checkpoint in fp32 as the class `kind` of transformers ("AutoModelFor..."); a head that does not
    fit is replaced by a new one.

    Raises UserError where it cannot be loaded, or has fewer positions than max_length.
    """
    import transformers

    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise UserError(f"--model {name} cannot be loaded: there is no such folder")  # and no name on a hub
    try:
        model = getattr(transformers, kind).from_pretrained(
            name, dtype=torch.float32, ignore_mismatched_sizes=True, **settings
        )
    except Exception as error:  # whatever a broken checkpoint raises, its first line says what is wrong with it
        raise UserError(f"--model {name} cannot be loaded: {one_line(error)}") from None
    limit = position_limit(model)
    if limit is not None and max_length > limit:
        raise UserError(f"--max-length {max_length} is more than the {limit} positions of --model {name}")
    return model


def load_tokenizer(name: str, which: str) -> Any:
    """A Hugging Face tokenizer. Raises UserError, which calls it `which`, where it cannot be loaded."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:
        raise UserError(f"{which} cannot be loaded: {one_line(error)}") from None


def position_limit(model: Any) -> int | None:
    """The longest sequence that the model has positions for; None where it does not say."""
    limit = getattr(model.config, "max_position_embeddings", None)
    # RoBERTa and its kin count positions from padding_idx + 1 on.
    if limit is not None and any(hasattr(m, "create_position_ids_from_input_ids") for m in model.modules()):
        limit -= model.config.pad_token_id + 1
    return limit


def labels(names: list[str]) -> dict[str, Any]:
    """The fields of a configuration that name its classes."""
    return {"id2label": dict(enumerate(names)), "label2id": {name: k for k, name in enumerate(names)}}
