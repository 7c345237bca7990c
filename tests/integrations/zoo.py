"""Tiny random models of every family, batches for them, and the comparison of two models."""

from __future__ import annotations

from typing import Any

import torch
import transformers

VOCAB = 97
WIDTH = 20

_SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "max_position_embeddings": 64,
}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_DECODER = {**_SMALL, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LAYERS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5}

# family: (class prefix, configuration)
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", {**_SMALL, **_NO_DROPOUT}),
    "roberta": ("Roberta", {**_SMALL, **_NO_DROPOUT, "pad_token_id": 1}),
    "xlm_roberta": ("XLMRoberta", {**_SMALL, **_NO_DROPOUT, "pad_token_id": 1}),
    "electra": ("Electra", {**_SMALL, **_NO_DROPOUT, "embedding_size": 32}),
    "albert": (
        "Albert",
        {**_SMALL, **_NO_DROPOUT, "embedding_size": 32, "num_hidden_layers": 4, "num_hidden_groups": 2,
         "classifier_dropout_prob": 0.0},
    ),
    "distilbert": (
        "DistilBert",
        {"vocab_size": VOCAB, "dim": 48, "n_layers": 2, "n_heads": 4, "hidden_dim": 80, "max_position_embeddings": 64,
         "dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0},
    ),
    "modernbert": (
        "ModernBert",
        {**_SMALL, "num_hidden_layers": 4, "local_attention": 6, "global_attn_every_n_layers": 2, "pad_token_id": 0,
         "embedding_dropout": 0.0},
    ),
}  # fmt: skip

DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": (
        "GPT2",
        {"vocab_size": VOCAB, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64, "resid_pdrop": 0.0,
         "embd_pdrop": 0.0, "attn_pdrop": 0.0, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "llama": ("Llama", _DECODER),
    "mistral": ("Mistral", {**_DECODER, "sliding_window": 5}),
    "qwen2": ("Qwen2", {**_DECODER, "use_sliding_window": True, "max_window_layers": 1, "sliding_window": 5}),
    "qwen3": ("Qwen3", {**_DECODER, "head_dim": 16}),
    "gemma2": ("Gemma2", {**_DECODER, **_LAYERS, "head_dim": 12, "attn_logit_softcapping": 2.0}),
    "gemma3": ("Gemma3", {**_DECODER, **_LAYERS, "head_dim": 12}),
    "gpt_oss": (
        "GptOss",
        {**_DECODER, **_LAYERS, "head_dim": 12, "num_local_experts": 4, "num_experts_per_tok": 2, "rope_scaling": None},
    ),
}  # fmt: skip

_SIDES = {"vocab_size": VOCAB, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
_BART = {
    "d_model": 48, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 80, "decoder_ffn_dim": 80, "max_position_embeddings": 64, "dropout": 0.0,
}  # fmt: skip

SEQ2SEQ: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": (
        "T5",
        {**_SIDES, "d_model": 48, "d_kv": 12, "d_ff": 80, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0,
         "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16},
    ),
    "bart": ("Bart", {**_SIDES, **_BART}),
    "mbart": ("MBart", {**_SIDES, **_BART}),
}  # fmt: skip

VISION: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": (
        "ViT",
        {**_NO_DROPOUT, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 80,
         "image_size": 16, "patch_size": 4},
    ),
}  # fmt: skip

_KEY_BIASES = ("key.bias", "k_lin.bias", "k_proj.bias")


def _known(families: dict[str, Any]) -> dict[str, Any]:
    """Families that the installed transformers shapes as ours expect; before version 5 not all of them."""
    later = ("distilbert", "modernbert", "gpt2", "gemma2", "gemma3")
    return families if IS_5 else {name: value for name, value in families.items() if name not in later}


IS_5 = int(transformers.__version__.split(".")[0]) >= 5
ALL = {**ENCODERS, **DECODERS, **SEQ2SEQ, **VISION}
LATER = sorted({**ENCODERS, **DECODERS}.keys() - {**_known(ENCODERS), **_known(DECODERS)}.keys())
ENCODERS, DECODERS = _known(ENCODERS), _known(DECODERS)
FAMILIES = {**ENCODERS, **DECODERS}


def config_of(family: str, **changes: Any) -> Any:
    prefix, settings = ALL[family]
    name = "Gemma3TextConfig" if family == "gemma3" else f"{prefix}Config"
    labels = {} if family in SEQ2SEQ else {"num_labels": 3}
    return getattr(transformers, name)(**{**settings, **labels, **changes})


def build(family: str, head: str, seed: int = 0, implementation: str = "eager", **changes: Any) -> Any:
    """A random model; `head` is "Model", "ForSequenceClassification", ... as in the class's name."""
    torch.manual_seed(seed)
    prefix = ALL[family][0]
    if family == "gemma3" and head in ("Model", "ForSequenceClassification"):
        prefix = "Gemma3Text"
    if family == "gpt2" and head == "ForCausalLM":
        head = "LMHeadModel"
    model = getattr(transformers, prefix + head)(config_of(family, attn_implementation=implementation, **changes))
    # Freshly initialised norms and biases are ones and zeros, under which many mistakes cancel.
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return model


def batch(lengths: list[int], side: str = "right", width: int = WIDTH, seed: int = 1, pad: int = 0) -> dict[str, Any]:
    """Ids and mask, padded on one side, or with "holes" in between."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (len(lengths), width), generator=generator)
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, n in enumerate(lengths):
        if side == "holes":
            mask[row, torch.randperm(width - 1, generator=generator)[: n - 1] + 1] = 1
            mask[row, 0] = 1
        else:
            mask[row, slice(0, n) if side == "right" else slice(width - n, width)] = 1
    return {"input_ids": torch.where(mask == 1, ids, pad), "attention_mask": mask}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm().clamp_min(1e-12)).item()


def assert_same_gradients(stock: Any, other: Any, tolerance: float = 1e-5) -> None:
    """Every gradient within `tolerance` of stock's, relative to it or to the largest one of the model."""
    scale = max(p.grad.norm().item() for p in stock.parameters() if p.grad is not None)
    for (name, p), q in zip(stock.named_parameters(), other.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is None:
            continue
        error = (q.grad - p.grad).norm().item()
        # A key's bias shifts all scores of a row alike: its gradient is zero but for rounding.
        size = scale if name.endswith(_KEY_BIASES) else p.grad.norm().item()
        assert error < tolerance * size + 1e-12, (name, error, size)
