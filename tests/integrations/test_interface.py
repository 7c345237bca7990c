"""attn_implementation="fastformer": every family against eager, and the traps of packed and padded batches."""

import pytest
import torch

import fastformer as ff
import fastformer.nn as fnn

transformers = pytest.importorskip("transformers", minversion="5")
import zoo  # noqa: E402

from fastformer.integrations.attention import attention_forward  # noqa: E402
from fastformer.integrations.masks import mask_forward  # noqa: E402
from fastformer.integrations.plan import PlanMask  # noqa: E402
from fastformer.integrations.transformers import register  # noqa: E402

HEAD = "ForSequenceClassification"
register()


def both(family, head="Model", **changes):
    """The same model with eager attention and with ours, not patched."""
    return zoo.build(family, head, **changes), zoo.build(family, head, implementation="fastformer", **changes)


def packed(lengths, seed=1):
    """A packed row with positions and lengths, and its sequences one by one."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, zoo.VOCAB, (1, n), generator=generator) for n in lengths]
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    row = {
        "input_ids": torch.cat(rows, 1),
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
    }
    flash = {
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }
    return row, flash, rows


def one_by_one(model, rows):
    return torch.cat([model(input_ids=row).last_hidden_state for row in rows], 1)


@pytest.mark.parametrize("side", ["right", "left", "holes"])
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_padded_batches_equal_eager(family, side):
    eager, ours = both(family, HEAD)
    data = zoo.batch([1, 7, 20, 13], side, pad=zoo.FAMILIES[family][1].get("pad_token_id", 0))
    data["labels"] = torch.tensor([0, 1, 2, 0])
    if family == "modernbert" and side == "left":
        pytest.skip("the head pools padding whose window holds no token: stock averages hidden values there")
    fnn.reset_count()
    a, b = eager.train()(**data), ours.train()(**data)
    assert sum(n for name, n in fnn.count().fused.items() if "Attention" in name) > 0
    a.loss.backward()
    b.loss.backward()
    assert zoo.relative(b.logits, a.logits) < 1e-5
    zoo.assert_same_gradients(eager, ours)


@pytest.mark.parametrize("family", zoo.DECODERS)
def test_generation_equals_eager(family):
    eager, ours = (m.eval() for m in both(family, "ForCausalLM"))
    data = zoo.batch([4, 9, 6], "left", width=9)
    ask = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(ours.generate(**data, **ask), eager.generate(**data, **ask))


def test_set_and_reset_the_implementation():
    model = zoo.build("llama", "Model").eval()
    data = zoo.batch([4, 9, 6])
    want = model(**data).last_hidden_state
    model.set_attn_implementation("fastformer")
    real = data["attention_mask"].bool()
    assert zoo.relative(model(**data).last_hidden_state[real], want[real]) < 1e-5
    model.set_attn_implementation("eager")
    assert torch.equal(model(**data).last_hidden_state, want)


# Trap 1: an attention function without a mask function sees no mask at all.
def test_register_brings_a_mask_function():
    from transformers.masking_utils import AttentionMaskInterface

    assert AttentionMaskInterface._global_mapping["fastformer"] is mask_forward


# Trap 2: a packed encoder must not look across sequences.
@pytest.mark.parametrize("family", [f for f in zoo.ENCODERS if f not in ("roberta", "xlm_roberta")])
@pytest.mark.parametrize("patched", [False, True])
def test_packed_encoder_with_lengths(family, patched):
    eager, ours = both(family)
    eager, ours = eager.eval(), ours.eval()
    row, flash, rows = packed([3, 9, 1, 6])
    want = one_by_one(eager, rows)
    if patched:
        ff.patch(ours)
    got = ours(**row, **flash).last_hidden_state
    if patched:  # padded back, so that heads find one sequence a row
        assert got.shape[:2] == (4, 9)
        got = torch.cat([got[i, :n] for i, n in enumerate([3, 9, 1, 6])])[None]
    assert zoo.relative(got, want) < 1e-5


# Trap 3: with the default use_cache, transformers no longer detects a packed row. Trap 4: nor with a mask of ones.
@pytest.mark.parametrize("ones", [False, True])
@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("family", zoo.DECODERS)
def test_packed_decoder_by_positions(family, patched, ones):
    eager, ours = both(family)
    eager, ours = eager.eval(), ours.eval()
    row, _, rows = packed([3, 9, 1, 6])
    want = one_by_one(eager, rows)
    if patched:
        ours.set_attn_implementation("eager")
        ff.patch(ours)
    if ones:
        row["attention_mask"] = torch.ones_like(row["input_ids"])
    assert zoo.relative(ours(**row).last_hidden_state, want) < 1e-5


def test_packed_lengths_and_padding_together_raise():
    ours = both("bert")[1].eval()
    row, flash, _ = packed([3, 9, 1, 6])
    mask = torch.ones_like(row["input_ids"])
    mask[0, 5] = 0
    with pytest.raises(ValueError, match="cu_seq_lens_q and an attention_mask"):
        ours(**row, **flash, attention_mask=mask)
    ff.patch(ours)
    with pytest.raises(ValueError, match="cu_seq_lens_q and attention_mask"):
        ours(**row, **flash, attention_mask=mask)
    with pytest.raises(ValueError, match="needs the fused path"):
        ours(**row, **flash, output_hidden_states=[1])


# Trap 5: cross-attention masks keys by the encoder's mask and leaves queries alone, even at equal lengths.
def test_cross_attention_to_a_padded_encoder():
    settings = {
        "vocab_size": 97, "d_model": 48, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 80, "decoder_ffn_dim": 80, "max_position_embeddings": 64,
        "dropout": 0.0, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0,
    }  # fmt: skip
    models = []
    for implementation in ("eager", "fastformer"):
        torch.manual_seed(0)
        config = transformers.BartConfig(**settings, attn_implementation=implementation)
        models.append(transformers.BartForConditionalGeneration(config).train())
    source, target = zoo.batch([4, 9, 6], width=9), zoo.batch([9, 9, 9], width=9, seed=2)
    data = {**source, "labels": target["input_ids"]}
    a, b = (m(**data) for m in models)
    a.loss.backward()
    b.loss.backward()
    assert zoo.relative(b.logits, a.logits) < 1e-5
    zoo.assert_same_gradients(*models)


# Trap 6: positions reach neither DistilBERT's and ModernBERT's attention nor their masks.
@pytest.mark.parametrize("ones", [False, True])
@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("family", [f for f in zoo.ENCODERS if f not in ("roberta", "xlm_roberta")])
def test_packed_encoder_by_positions_alone(family, patched, ones):
    eager, ours = both(family)
    eager.eval()
    ours.eval()
    if patched:
        ff.patch(ours)
    row, _, rows = packed([3, 9, 1, 6])
    mask = {"attention_mask": torch.ones_like(row["input_ids"])} if ones else {}
    assert zoo.relative(ours(**row, **mask).last_hidden_state, one_by_one(eager, rows)) < 1e-5
    # Ordinary positions say nothing.
    row["position_ids"] = torch.arange(19)[None]
    assert zoo.relative(ours(**row, **mask).last_hidden_state, eager(**row).last_hidden_state) < 1e-5


def test_ordinary_positions_are_not_taken_for_packing():
    eager, ours = zoo.build("bert", "Model").eval(), zoo.build("bert", "Model").eval()
    ff.patch(ours)
    ids = torch.randint(3, zoo.VOCAB, (1, 8))
    for places in (torch.arange(8), torch.arange(8).flip(0), torch.tensor([0, 1, 2, 2, 2, 3, 4, 5])):
        call = {"input_ids": ids, "position_ids": places[None]}
        assert zoo.relative(ours(**call)[0], eager(**call)[0]) < 1e-5


def test_what_is_not_understood_raises():
    module = torch.nn.Identity()
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(ValueError, match="does not know the argument cache_window"):
        attention_forward(module, q, q, q, None, cache_window=4)
    with pytest.raises(ValueError, match="2 or 4 dimensions"):
        attention_forward(module, q, q, q, torch.ones(1, 4, 4))
    lengths = torch.tensor([0, 2, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match="one packed row"):
        attention_forward(module, q.expand(2, -1, -1, -1), q, q, None, cu_seq_lens_q=lengths, max_length_q=2)
    with pytest.raises(ValueError, match="needs max_length_q"):
        attention_forward(module, q, q, q, None, cu_seq_lens_q=lengths)


def test_masks_of_unknown_patterns_are_written_out():
    from transformers.masking_utils import causal_mask_function, chunked_causal_mask_function, sdpa_mask

    call = {"batch_size": 1, "q_length": 6, "kv_length": 6, "attention_mask": None, "device": torch.device("cpu")}
    known = mask_forward(mask_function=causal_mask_function, **call)
    assert isinstance(known, PlanMask)
    assert known.plan.causal
    chunked = chunked_causal_mask_function(3, torch.zeros(1, dtype=torch.long))
    got = mask_forward(mask_function=chunked, **call)
    assert torch.equal(got, sdpa_mask(mask_function=chunked, **call, allow_is_causal_skip=False))
