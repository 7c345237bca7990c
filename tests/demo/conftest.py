"""A tiny BERT and passages of uneven length."""

import random

import pytest

from fastformer.demo.training import Passages

VOCAB = 100
LENGTH = 48  # of padded batches


@pytest.fixture(scope="session")
def passages() -> Passages:
    """200 passages of 3 to 48 tokens; the label shows in the share of low ids, so that there is something to learn."""
    draw = random.Random(0)
    ids, labels = [], []
    for _ in range(200):
        label = draw.randrange(3)
        length = min(LENGTH, 3 + int(draw.expovariate(1 / 12)))
        ids.append([1, *(draw.randrange(3 + 30 * label, VOCAB) for _ in range(length - 2)), 2])
        labels.append(label)
    return Passages(ids, labels)


@pytest.fixture(scope="session")
def tiny_bert():
    """tiny_bert(**config): a new two-layer BERT classifier of width 32, the same weights every time."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    def build(**config):
        state = torch.get_rng_state()
        torch.manual_seed(7)
        model = BertForSequenceClassification(
            BertConfig(
                vocab_size=VOCAB,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=64,
                max_position_embeddings=LENGTH,
                num_labels=3,
                **config,
            )
        )
        torch.set_rng_state(state)
        return model

    return build
