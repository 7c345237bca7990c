"""Adaptive compression inside Hugging Face's Trainer."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from fastformer.compress.adaptive import AdaptiveCompressor
from fastformer.compress.report import CompressionReport


class AdaptiveCompressionCallback(TrainerCallback):
    """An `AdaptiveCompressor` driven by Trainer's evaluations.

    >>> callback = AdaptiveCompressionCallback("accuracy", eval_size=len(validation))
    >>> Trainer(model, arguments, ..., compute_metrics=..., callbacks=[callback]).train()
    >>> print(callback.report)

    Trainer must evaluate during training (eval_strategy) on data that is not the test data, and must not load the best
    model at the end, which would bring the dense one back. When training ends the model is compact, and
    Trainer.save_model saves it.

    Args:
        metric: name among the metrics of an evaluation, with or without "eval_".
        stop: whether training stops when the search has ended; otherwise it goes on at the rate found.
        options: of `AdaptiveCompressor`.

    Attributes:
        compressor: from the beginning of training on.
        report: from its end on.
    """

    def __init__(self, metric: str, *, stop: bool = True, **options: Any) -> None:
        if not isinstance(metric, str) or not metric:
            raise ValueError(f"metric must be the name of a metric, got {metric!r}")
        self.metric = metric if metric.startswith("eval_") else f"eval_{metric}"
        self.stop, self.options = stop, options
        self.compressor: AdaptiveCompressor | None = None
        self.report: CompressionReport | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Raises ValueError for settings of Trainer under which this cannot work."""
        if str(getattr(args.eval_strategy, "value", args.eval_strategy)) == "no":
            raise ValueError('eval_strategy must be "steps" or "epoch" for adaptive compression, got "no"')
        if args.load_best_model_at_end:
            raise ValueError("load_best_model_at_end must be False: it would bring the dense model back at the end")
        if state.global_step:
            raise ValueError("adaptive compression cannot go on from the middle of a run; start without a checkpoint")
        if getattr(args, "deepspeed", None) or getattr(args, "fsdp", None):
            raise ValueError("adaptive compression needs whole parameters, got a Trainer that shards them")
        self.compressor = AdaptiveCompressor(model, kwargs["optimizer"], **self.options)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> Any:
        if self.compressor is None or self.report is not None or not state.global_step:
            return control  # before training, or after it
        if self.metric not in metrics:
            raise ValueError(f"metric must be one of {sorted(metrics)}, got {self.metric!r}")
        evaluation = self.compressor.update(metrics[self.metric])
        if state.is_world_process_zero:
            state.log_history.append({
                "step": state.global_step,
                "compression_rate": self.compressor.rate,
                "compression_decision": evaluation.decision,
            })  # fmt: skip
        if self.stop and self.compressor.done:
            control.should_training_stop = True
        return control

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.compressor is not None
        self.report = self.compressor.finish()
