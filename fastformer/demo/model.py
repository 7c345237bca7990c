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
    """A small BERT classifier with random weights in BERT's proportions: heads of 64, feed-forward 4x, dropout 0.1."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=vocab_size,
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HIDDEN // 64,
            intermediate_size=4 * HIDDEN,
            max_position_embeddings=max_length,
            pad_token_id=pad_id,
            **_labels(names),
        )
    )


def load_checkpoint(
    name: str, tokenizer_name: str | None, names: list[str], max_length: int, seed: int
) -> tuple[nn.Module, Encoder]:
    """A Hugging Face checkpoint with a classification head for `names`, in fp32, and its tokenizer.

    Raises UserError where either cannot be loaded, or the model has fewer positions than max_length.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise UserError(f"--model {name} cannot be loaded: there is no such folder")  # and no name on a hub
    torch.manual_seed(seed)
    try:
        model = AutoModelForSequenceClassification.from_pretrained(
            name,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # a head for other classes is replaced by a new one
            problem_type="single_label_classification",
            **_labels(names),
        )
    except Exception as error:  # whatever a broken checkpoint raises, its first line says what is wrong with it
        raise UserError(f"--model {name} cannot be loaded: {one_line(error)}") from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_name or name)
    except Exception as error:
        which = f"--tokenizer {tokenizer_name}" if tokenizer_name else f"the tokenizer of --model {name}"
        raise UserError(f"{which} cannot be loaded: {one_line(error)}") from None
    limit = position_limit(model)
    if limit is not None and max_length > limit:
        raise UserError(f"--max-length {max_length} is more than the {limit} positions of --model {name}")
    encoder = checkpoint_encoder(tokenizer, max_length)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = encoder.pad_id
    return model, encoder


def position_limit(model: Any) -> int | None:
    """The longest sequence that the model has positions for; None where it does not say."""
    limit = getattr(model.config, "max_position_embeddings", None)
    # RoBERTa and its kin count positions from padding_idx + 1 on.
    if limit is not None and any(hasattr(m, "create_position_ids_from_input_ids") for m in model.modules()):
        limit -= model.config.pad_token_id + 1
    return limit


def _labels(names: list[str]) -> dict[str, Any]:
    return {"id2label": dict(enumerate(names)), "label2id": {name: k for k, name in enumerate(names)}}
