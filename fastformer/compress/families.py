"""Where a layer's attention heads and feed-forward channels live: one line a layer class.

A class is named by its path as a string, so nothing is imported that the model has not imported itself.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Heads:
    """Names of an attention module's parts, seen from the layer.

    Attributes:
        module: the attention module, which holds the sizes.
        inputs: projections to queries, keys and values; the last but one is the keys', whose rows tell the number of
            units (key heads: queries that share one go with it).
        output: projection of the joined heads.
        head_size: attribute with the width of a head.
        counts: attributes with a number of query heads; widths: with a number of query rows.
        packed: how many projections one input holds, one behind the other.
        joint: whether the module itself holds the projections, as torch.nn.MultiheadAttention does.
    """

    module: str
    inputs: tuple[str, ...]
    output: str
    head_size: str = "head_dim"
    counts: tuple[str, ...] = ("num_heads", "num_attention_heads")
    widths: tuple[str, ...] = ()
    packed: int = 1
    joint: bool = False


@dataclass(frozen=True)
class Channels:
    """Names of a feed-forward's parts, seen from the layer; `packed` as in `Heads` (gate and value in one)."""

    inputs: tuple[str, ...]
    output: str
    packed: int = 1


@dataclass(frozen=True)
class Layer:
    """What can be pruned of a layer.

    Attributes:
        heads, channels: its parts; those that a layer does not have are passed over.
        config_width: field of the configuration with the number of channels of all layers, or None.
        heads_in_config: whether the configuration can tell another number of heads than the hidden size implies.
        left: names of parts that are never pruned, each with the reason.
    """

    heads: tuple[Heads, ...] = ()
    channels: tuple[Channels, ...] = ()
    config_width: str | None = None
    heads_in_config: bool = False
    left: tuple[tuple[str, str], ...] = ()


_BERT = Layer(
    (
        Heads(
            "attention.self",
            ("attention.self.query", "attention.self.key", "attention.self.value"),
            "attention.output.dense",
            "attention_head_size",
            widths=("all_head_size",),
        ),
    ),
    (Channels(("intermediate.dense",), "output.dense"),),
    "intermediate_size",
    left=(("crossattention", "cross-attention heads of this family are not pruned"),),
)
_DISTILBERT = Layer(
    (
        Heads(
            "attention",
            ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
            "attention.out_lin",
            "attention_head_size",
            ("n_heads",),
        ),
    ),
    (Channels(("ffn.lin1",), "ffn.lin2"),),
    "hidden_dim",
)
_ALBERT = Layer(
    (
        Heads(
            "attention",
            ("attention.query", "attention.key", "attention.value"),
            "attention.dense",
            "attention_head_size",
            widths=("all_head_size",),
        ),
    ),
    (Channels(("ffn",), "ffn_output"),),
    "intermediate_size",
)
_MODERNBERT = Layer(
    (Heads("attn", ("attn.Wqkv",), "attn.Wo", counts=(), packed=3),),
    (Channels(("mlp.Wi",), "mlp.Wo", packed=2),),
    "intermediate_size",
)
_VIT = Layer(
    (Heads("attention", ("attention.q_proj", "attention.k_proj", "attention.v_proj"), "attention.o_proj"),),
    (Channels(("mlp.fc1",), "mlp.fc2"),),
    "intermediate_size",
)
_GPT2 = Layer(
    (Heads("attn", ("attn.c_attn",), "attn.c_proj", widths=("split_size",), packed=3),),
    (Channels(("mlp.c_fc",), "mlp.c_proj"),),
    "n_inner",
    left=(("crossattention", "cross-attention heads of this family are not pruned"),),
)
_LLAMA = Layer(
    (Heads("self_attn", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.o_proj"),),
    (Channels(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),),
    "intermediate_size",
    heads_in_config=True,
)


def _bart(*attentions: str) -> Layer:
    heads = (Heads(a, (f"{a}.q_proj", f"{a}.k_proj", f"{a}.v_proj"), f"{a}.out_proj") for a in attentions)
    return Layer(tuple(heads), (Channels(("fc1",), "fc2"),))


_T5_WHY = "T5's heads share one position bias over all layers of a stack, which fixes their number"
_T5 = Layer((), (Channels(("wi",), "wo"), Channels(("wi_0", "wi_1"), "wo")), "d_ff")
_T5_ATTENTION = Layer(left=(("o", _T5_WHY),))
_TORCH = Layer(
    tuple(Heads(name, (name,), f"{name}.out_proj", packed=3, joint=True) for name in ("self_attn", "multihead_attn")),
    (Channels(("linear1",), "linear2"),),
)


def _paths(layer: Layer, *names: str) -> dict[str, Layer]:
    return {f"transformers.models.{name}": layer for name in names}


LAYERS: dict[str, Layer] = {
    **_paths(
        _BERT,
        "bert.modeling_bert.BertLayer",
        "roberta.modeling_roberta.RobertaLayer",
        "xlm_roberta.modeling_xlm_roberta.XLMRobertaLayer",
        "electra.modeling_electra.ElectraLayer",
    ),
    **_paths(_DISTILBERT, "distilbert.modeling_distilbert.TransformerBlock"),
    **_paths(_ALBERT, "albert.modeling_albert.AlbertLayer"),
    **_paths(_MODERNBERT, "modernbert.modeling_modernbert.ModernBertEncoderLayer"),
    **_paths(_VIT, "vit.modeling_vit.ViTLayer"),
    **_paths(_GPT2, "gpt2.modeling_gpt2.GPT2Block"),
    **_paths(
        _LLAMA,
        "llama.modeling_llama.LlamaDecoderLayer",
        "mistral.modeling_mistral.MistralDecoderLayer",
        "qwen2.modeling_qwen2.Qwen2DecoderLayer",
        "qwen3.modeling_qwen3.Qwen3DecoderLayer",
        "gemma2.modeling_gemma2.Gemma2DecoderLayer",
        "gemma3.modeling_gemma3.Gemma3DecoderLayer",
    ),
    **_paths(_bart("self_attn"), "bart.modeling_bart.BartEncoderLayer", "mbart.modeling_mbart.MBartEncoderLayer"),
    **_paths(
        _bart("self_attn", "encoder_attn"),
        "bart.modeling_bart.BartDecoderLayer",
        "mbart.modeling_mbart.MBartDecoderLayer",
    ),
    **_paths(_T5, "t5.modeling_t5.T5DenseActDense", "t5.modeling_t5.T5DenseGatedActDense"),
    **_paths(_T5_ATTENTION, "t5.modeling_t5.T5Attention"),
    "torch.nn.modules.transformer.TransformerEncoderLayer": _TORCH,
    "torch.nn.modules.transformer.TransformerDecoderLayer": _TORCH,
    "fastformer.nn.layers.TransformerEncoderLayer": _TORCH,
    "fastformer.nn.layers.TransformerDecoderLayer": _TORCH,
}
NAMES = (
    "BERT, RoBERTa, XLM-RoBERTa, ELECTRA, DistilBERT, ALBERT, ModernBERT, ViT, GPT-2, Llama, Mistral, Qwen 2 and 3, "
    "Gemma 2 and 3, BART, mBART, T5 (channels), torch.nn's and fastformer.nn's layers"
)
