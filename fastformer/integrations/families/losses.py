"""Heads and their losses: cross-entropy through fastformer's operators.

- `FusedLoss`: a head of tokens, sequences or a language model. Where the stock forward calls `self.loss_function`, it
  finds ours there, with stock's meaning of ignore_index, num_items_in_batch and shifted labels. Where it computes its
  loss itself (`InlineLoss`), it is called without labels and the loss follows. Logits are stock's.
- `LinearLoss` (patch(model, fused_loss=True)): a language model's head in training computes its loss from the hidden
  states, a block of rows at a time: the logits of a batch exist nowhere, and `logits` of its output is None. In
  evaluation, and wherever labels are missing, logits are computed as ever.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastformer import ops
from fastformer.integrations.families import batch
from fastformer.integrations.families.interface import UnpackingHead
from fastformer.integrations.families.rule import Rule
from fastformer.integrations.swap import class_path, original_class
from fastformer.nn.counters import count_fallback, count_fused
from fastformer.nn.norm import has_hooks
from fastformer.ops.backend import backend_for

_IGNORED = -100  # of torch.nn.functional.cross_entropy
_LOSSES = "transformers.loss.loss_utils"


class FusedLoss:
    """A head that takes its loss from `self.loss_function`."""

    @property
    def loss_function(self) -> Any:
        own = getattr(self, "_loss_function", None)
        if own is not None:
            return own
        from transformers.loss.loss_utils import LOSS_MAPPING

        # By name, as stock looks it up; a mapping may hold somebody's own function too.
        stock = LOSS_MAPPING.get(getattr(self, "loss_type", None) or "", LOSS_MAPPING["ForCausalLM"])
        kind = _KINDS.get(stock.__name__) if stock.__module__ == _LOSSES else None
        return stock if kind is None else functools.partial(kind, self, stock)

    @loss_function.setter
    def loss_function(self, value: Any) -> None:
        self._loss_function = value

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("cu_seq_lens_q") is not None and not batch.takes_lengths(self):
            return super().forward(**batch.unpack_call(self, batch.named_arguments(self, args, kwargs)))  # type: ignore[misc]
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    def _cross_entropy(
        self, logits: Tensor, target: Tensor, ignore_index: int = _IGNORED, items: Any = None, wide: bool = False
    ) -> Tensor:
        """Mean loss of rows, or their sum divided by `items`; in fp32 if `wide`."""
        count_fused(type(self).__name__)
        logits, target = logits.reshape(-1, logits.shape[-1]), target.to(logits.device).reshape(-1)
        if wide and backend_for(logits.device) == "torch":
            logits = logits.float()
        with _wide_result(logits, wide):
            return _over_items(ops.cross_entropy, items, logits, target, ignore_index=ignore_index)


class InlineLoss(FusedLoss):
    """A head whose stock forward computes the mean over its rows, tokens here, itself."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = batch.named_arguments(self, args, kwargs)
        labels = call.get("labels")
        reason = "" if labels is None else self._why_stock_loss(labels)
        if labels is None or reason:
            if reason:
                count_fallback(type(self).__name__, reason)
            return super().forward(*args, **kwargs)
        call = self._without_labels(call)
        return_dict = call.pop("return_dict", None)
        out = super().forward(**call, return_dict=True)
        out = type(out)(loss=self._cross_entropy(out.logits, labels), **out)
        return batch.answer(self, out, return_dict)

    def _why_stock_loss(self, labels: Tensor) -> str:
        return "" if labels.dtype == torch.int64 else f"labels of {labels.dtype}"

    def _without_labels(self, call: dict[str, Any]) -> dict[str, Any]:
        """The call that computes the same logits."""
        return {name: value for name, value in call.items() if name != "labels"}


class InlineSequenceLoss(InlineLoss):
    """The same where rows are sequences; regression and several labels a sequence keep stock's loss."""

    def _why_stock_loss(self, labels: Tensor) -> str:
        if not _is_single_label(self.config, self.num_labels, labels):  # type: ignore[attr-defined]
            return "not one label a sequence"
        return super()._why_stock_loss(labels)


class FirstPlaceLoss(InlineSequenceLoss):
    """The same where nothing of the hidden states is read but the first place of every row: a base model that has
    removed the padding puts no more of it back. What stands in place of a pooler or head may read all of them."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return batch.FIRST_PLACE.during(self._reads_first(), super().forward, *args, **kwargs)

    def _reads_first(self) -> bool:
        """Whether nobody looks on who would see the rest missing."""
        base, kind = getattr(self, self.base_model_prefix), self.config.model_type  # type: ignore[attr-defined]
        parts = [base]
        if kind != "albert":  # whose pooler gets first places anyway
            parts.append(getattr(base, "pooler", None))
        if kind in ("roberta", "xlm-roberta", "electra"):
            parts.append(self.classifier)  # type: ignore[attr-defined]
        return not any(part is not None and batch.is_changed(part) for part in parts)


class Seq2SeqLoss(InlineLoss):
    """The same for a language model behind an encoder-decoder, where labels make the decoder's inputs."""

    def _without_labels(self, call: dict[str, Any]) -> dict[str, Any]:
        call = dict(call)
        labels = call.pop("labels")
        if self.config.model_type != "t5":  # type: ignore[attr-defined]
            call["use_cache"] = False  # as BART's forward decides when it is given labels
        if call.get("decoder_input_ids") is None and call.get("decoder_inputs_embeds") is None:
            call["decoder_input_ids"] = self.prepare_decoder_input_ids_from_labels(labels)  # type: ignore[attr-defined]
        return call


class UnpackingLoss(UnpackingHead, FusedLoss):
    """A sequence head that reads ids or mask itself, and takes its loss from `self.loss_function`."""


class UnpackingInlineLoss(UnpackingHead, InlineSequenceLoss):
    """A sequence head that reads ids or mask itself, and computes its loss itself."""


class LinearLoss(FusedLoss):
    """A language model's head whose loss needs no logits."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = batch.named_arguments(self, args, kwargs)
        if call.get("labels") is None or not self.training:  # type: ignore[attr-defined]
            return super().forward(*args, **kwargs)
        reason = self._why_logits(call)
        if reason:
            count_fallback(type(self).__name__, f"logits are computed: {reason}")
            return super().forward(*args, **kwargs)
        layer = self.get_output_embeddings()  # type: ignore[attr-defined]
        return_dict = call.pop("return_dict", None)
        layer.fastformer_seen = []
        try:
            out = super().forward(**call, return_dict=True)
        finally:
            del layer.fastformer_seen
        return batch.answer(self, type(out)(**{**out, "logits": None}), return_dict)

    def _why_logits(self, call: dict[str, Any]) -> str:
        layer = self.get_output_embeddings()  # type: ignore[attr-defined]
        if getattr(type(layer).forward, "fastformer_behaviour", None) is not OutputLayer:
            return "its output layer was replaced"
        if not _is_nothing(call.get("logits_to_keep")):
            return "logits_to_keep"
        if call["labels"].dtype != torch.int64:
            return f"labels of {call['labels'].dtype}"
        if not isinstance(self, InlineLoss) and not isinstance(self.loss_function, functools.partial):
            return "its loss function is somebody's own"
        return why_not_linear(self)  # type: ignore[arg-type]

    def _cross_entropy(
        self, logits: Tensor, target: Tensor, ignore_index: int = _IGNORED, items: Any = None, wide: bool = False
    ) -> Tensor:
        layer = self.get_output_embeddings()  # type: ignore[attr-defined]
        seen = layer.__dict__.get("fastformer_seen")
        if not seen:
            return super()._cross_entropy(logits, target, ignore_index, items, wide)
        count_fused(type(self).__name__)
        hidden: Tensor = seen.pop()
        hidden, target = hidden.reshape(-1, hidden.shape[-1]), target.to(hidden.device).reshape(-1)
        if hidden.device.type == "cpu" and not torch.compiler.is_compiling():
            # A row without a label costs as much as any other. On a GPU, telling them apart would mean waiting for it.
            kept = target != ignore_index
            if kept.any():
                hidden, target = hidden[kept], target[kept]
        bias = layer.bias
        if hasattr(self, "final_logits_bias"):
            bias = self.final_logits_bias.squeeze(0).to(layer.weight.dtype)
        options = {"ignore_index": ignore_index, "softcap": _softcap(self)}
        with _wide_result(hidden, wide):
            return _over_items(ops.linear_cross_entropy, items, hidden, layer.weight, target, bias, **options)


class InlineLinearLoss(LinearLoss, InlineLoss):
    """The same for a head whose stock forward computes its loss itself."""


class Seq2SeqLinearLoss(LinearLoss, Seq2SeqLoss):
    """The same behind an encoder-decoder."""


class OutputLayer:
    """The output layer of a `LinearLoss` head, which notes hidden states instead of projecting them while one runs."""

    def forward(self, input: Tensor) -> Tensor:
        seen = self.__dict__.get("fastformer_seen")
        if seen is None:
            return super().forward(input)  # type: ignore[misc]
        seen.append(input)
        return input.new_empty((*input.shape[:-2], 0, self.out_features))  # type: ignore[attr-defined]


# What stands in for transformers' loss functions: (head, the stock function, its arguments).


def _causal(
    head: Any,
    stock: Callable[..., Tensor],
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int | None = None,
    num_items_in_batch: Any = None,
    ignore_index: int = _IGNORED,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    if shift_labels is None:
        assert labels is not None
        # Token n is judged by label n + 1; the last has none.
        shift_labels = torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    return head._cross_entropy(logits, shift_labels, ignore_index, num_items_in_batch, wide=True)


def _masked(
    head: Any,
    stock: Callable[..., Tensor],
    logits: Tensor,
    labels: Tensor,
    vocab_size: int | None = None,
    num_items_in_batch: Any = None,
    ignore_index: int = _IGNORED,
    **kwargs: Any,
) -> Tensor:
    return head._cross_entropy(logits, labels, ignore_index, num_items_in_batch, wide=True)


def _token(
    head: Any, stock: Callable[..., Tensor], logits: Tensor, labels: Tensor, config: Any, **kwargs: Any
) -> Tensor:
    items, ignored = kwargs.get("num_items_in_batch"), kwargs.get("ignore_index", _IGNORED)
    return head._cross_entropy(logits, labels, ignored, items, wide=True)


def _sequence(
    head: Any, stock: Callable[..., Tensor], labels: Tensor, pooled_logits: Tensor, config: Any, **kwargs: Any
) -> Tensor:
    if labels.dtype != torch.int64 or not _is_single_label(config, config.num_labels, labels):
        count_fallback(type(head).__name__, "not one label a sequence")
        return stock(labels, pooled_logits, config, **kwargs)
    items, ignored = kwargs.get("num_items_in_batch"), kwargs.get("ignore_index", _IGNORED)
    return head._cross_entropy(pooled_logits, labels, ignored, items)


_KINDS: dict[str, Callable[..., Tensor]] = {
    "ForCausalLMLoss": _causal,
    "ForMaskedLMLoss": _masked,
    "ForTokenClassification": _token,
    "ForSequenceClassificationLoss": _sequence,
}


def _is_single_label(config: Any, num_labels: int, labels: Tensor) -> bool:
    """Whether a sequence has one label; settles config.problem_type as the stock head does."""
    if config.problem_type is None and num_labels > 1 and labels.dtype in (torch.int64, torch.int32):
        config.problem_type = "single_label_classification"
    return config.problem_type == "single_label_classification"


def _over_items(loss: Callable[..., Tensor], items: Any, *args: Any, **kwargs: Any) -> Tensor:
    if items is None:
        return loss(*args, **kwargs)
    total = loss(*args, **kwargs, reduction="sum")
    return total / (items.to(total.device) if isinstance(items, Tensor) else items)


def _wide_result(tensor: Tensor, wide: bool) -> contextlib.AbstractContextManager[Any]:
    """The loss of 16-bit tensors is fp32 inside; as PyTorch's own, it comes out so under autocast only."""
    if wide and tensor.dtype in (torch.float16, torch.bfloat16):
        return torch.autocast(tensor.device.type, tensor.dtype)
    return contextlib.nullcontext()


def _is_nothing(logits_to_keep: Any) -> bool:
    return logits_to_keep is None or (isinstance(logits_to_keep, int) and logits_to_keep == 0)


def _softcap(head: Any) -> float | None:
    return getattr(head.config, "final_logit_softcapping", None)


def why_not_linear(head: torch.nn.Module) -> str:
    """Reason why a head's loss needs its logits, or ""."""
    layer: Any = head.get_output_embeddings()  # type: ignore[operator]
    if layer is None or original_class(layer) is not torch.nn.Linear:
        return f"its output layer is a {type(layer).__name__}"
    if has_hooks(layer):
        return "its output layer is hooked"
    if layer.bias is not None and hasattr(head, "final_logits_bias"):
        return "its logits have two biases"
    return ""


@functools.cache
def calls_loss_function(cls: Any) -> bool:
    """Whether a head's stock forward takes its loss from `self.loss_function`."""
    forward = inspect.unwrap(cls.forward)
    return "loss_function" in getattr(getattr(forward, "__code__", None), "co_names", ())


def _why_not_inline(head: torch.nn.Module) -> str:
    return "it computes its loss in another way" if calls_loss_function(original_class(head)) else ""


def _why_not_inline_linear(head: torch.nn.Module) -> str:
    return _why_not_inline(head) or why_not_linear(head)


def _path(family: str, name: str) -> str:
    return f"transformers.models.{family}.modeling_{family}.{name}"


def _rules(behaviour: type, why_not: Callable[[torch.nn.Module], str], *names: tuple[str, str]) -> dict[str, Rule]:
    what = "loss without logits in training" if issubclass(behaviour, LinearLoss) else "fused cross-entropy"
    if issubclass(behaviour, UnpackingHead):
        what = "takes packed batches; fused cross-entropy"
    return {_path(family, name): Rule(behaviour, what, why_not) for family, name in names}


def _never(head: torch.nn.Module) -> str:
    return ""


_ENCODERS = (
    ("bert", "Bert"), ("roberta", "Roberta"), ("xlm_roberta", "XLMRoberta"), ("electra", "Electra"),
    ("albert", "Albert"), ("distilbert", "DistilBert"),
)  # fmt: skip
_DECODERS = (
    ("llama", "Llama"), ("mistral", "Mistral"), ("qwen2", "Qwen2"), ("qwen3", "Qwen3"), ("gemma2", "Gemma2"),
    ("gemma3", "Gemma3"), ("gpt_oss", "GptOss"),
)  # fmt: skip
_MASKED = tuple((family, f"{prefix}ForMaskedLM") for family, prefix in _ENCODERS)
_SEQ2SEQ = tuple((f, f"{p}ForConditionalGeneration") for f, p in (("t5", "T5"), ("bart", "Bart"), ("mbart", "MBart")))
_CAUSAL = (
    ("gpt2", "GPT2LMHeadModel"),
    ("modernbert", "ModernBertForMaskedLM"),
    *((family, f"{prefix}ForCausalLM") for family, prefix in _DECODERS),
)
_CLASSIFIERS = (
    *((family, f"{prefix}ForSequenceClassification") for family, prefix in _DECODERS if family != "gemma3"),
    ("gemma3", "Gemma3TextForSequenceClassification"),
)

RULES = {
    **_rules(InlineLoss, _why_not_inline, *_MASKED, ("modernbert", "ModernBertForTokenClassification")),
    **_rules(InlineLoss, _why_not_inline, *((f, f"{p}ForTokenClassification") for f, p in _ENCODERS)),
    **_rules(FirstPlaceLoss, _why_not_inline, *((f, f"{p}ForSequenceClassification") for f, p in _ENCODERS)),
    **_rules(Seq2SeqLoss, _why_not_inline, *_SEQ2SEQ),
    **_rules(FusedLoss, _never, *_CAUSAL),
    **_rules(UnpackingLoss, _never, *_CLASSIFIERS),
    **_rules(
        UnpackingInlineLoss,
        _why_not_inline,
        ("gpt2", "GPT2ForSequenceClassification"),
        ("modernbert", "ModernBertForSequenceClassification"),
    ),
}
# In place of the others, for patch(model, fused_loss=True).
LINEAR = {
    **_rules(InlineLinearLoss, _why_not_inline_linear, *_MASKED),
    **_rules(Seq2SeqLinearLoss, _why_not_inline_linear, *_SEQ2SEQ),
    **_rules(LinearLoss, why_not_linear, *_CAUSAL),
}
OUTPUT_LAYER = Rule(OutputLayer, "projects no hidden states where the loss needs no logits")
LOSS = Rule(FusedLoss, "fused cross-entropy")


def linear_rule(module: torch.nn.Module) -> Rule | None:
    """The rule for a language model's head whose loss is to do without logits."""
    return LINEAR.get(class_path(module))


def recognise(module: torch.nn.Module) -> Rule | None:
    """The rule for a head of a class no table names, if its stock loss is one that is known."""
    known = {
        "ForCausalLM",
        "ForMaskedLM",
        "ForTokenClassification",
        "ForSequenceClassification",
        "ForImageClassification",
    }
    if getattr(module, "loss_type", None) in known and calls_loss_function(original_class(module)):
        return LOSS
    return None
