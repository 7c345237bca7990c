"""Small models and batches for the tests of graphs."""

import copy

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import fastformer as ff

VOCABULARY, LABELS = 50, 3
_BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "num_labels": LABELS,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_DISTIL = {
    "vocab_size": VOCABULARY, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "num_labels": LABELS,
    "dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0,
}  # fmt: skip
_GPT2 = {
    "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128, "bos_token_id": 1,
    "eos_token_id": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False,
}  # fmt: skip
_LLAMA = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "use_cache": False,
}  # fmt: skip


def model(name: str = "bert", device: torch.device | str = "cpu", seed: int = 0, **changes):
    """A small patched model in training mode."""
    torch.manual_seed(seed)
    made = {
        "bert": lambda: BertForSequenceClassification(BertConfig(**_BERT | changes)),
        "bert-tokens": lambda: BertForTokenClassification(BertConfig(**_BERT | changes)),
        "bert-mlm": lambda: BertForMaskedLM(BertConfig(**_BERT | changes)),
        "roberta": lambda: RobertaForSequenceClassification(
            RobertaConfig(**_BERT | {"pad_token_id": 1, "max_position_embeddings": 130} | changes)
        ),
        "distilbert": lambda: DistilBertForSequenceClassification(DistilBertConfig(**_DISTIL | changes)),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**_GPT2 | changes)),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**_LLAMA | changes)),
    }[name]()
    made.to(device).train()
    assert ff.patch(made)
    return made


def pair(name: str = "bert", device: torch.device | str = "cpu", **changes):
    """(a model to capture, the same left alone)."""
    one = model(name, device, **changes)
    return one, copy.deepcopy(one)


def batches(number: int, device: torch.device | str = "cpu", *, tokens: bool = False, pad: int = 0, seed: int = 0,
            sizes: tuple[int, int] = (3, 7), longest: int = 40, left: bool = False,
            full: int | None = None):  # fmt: skip
    """Padded batches of several sizes and lengths.

    Args:
        tokens: labels for every token rather than every sequence.
        left: padding on the left.
        full: pad to this length rather than to the longest.
    """
    g = torch.Generator().manual_seed(seed)

    def between(low, high):
        return int(torch.randint(low, high, (1,), generator=g))

    for _ in range(number):
        size, length = between(*sizes), between(5, longest)
        lengths = torch.randint(1, length + 1, (size,), generator=g)
        lengths[0] = length
        width = full or length
        mask = (torch.arange(width) < lengths[:, None]).long()
        mask = mask.flip(1) if left else mask
        ids = torch.where(mask != 0, torch.randint(3, VOCABULARY, (size, width), generator=g), pad)
        if tokens:
            labels = torch.where(mask != 0, torch.randint(0, LABELS, (size, width), generator=g), -100)
        else:
            labels = torch.randint(0, LABELS, (size,), generator=g)
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        yield {name: value.to(device) for name, value in batch.items()}


def train(module, data, *, rate: float = 1e-3, accumulate: int = 1, clip: float | None = None, autocast=None):
    """Losses of an ordinary loop."""
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], rate)
    losses = []
    for number, batch in enumerate(data, 1):
        device = batch["input_ids"].device.type
        with torch.autocast(device, autocast or torch.bfloat16, enabled=autocast is not None):
            loss = module(**batch).loss
        losses.append(loss.detach())
        (loss / accumulate).backward()
        if number % accumulate == 0:
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(module.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    return torch.stack(losses)
