"""The libraries that benchmarks compare with: which are installed here, and how the others come."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass


@dataclass(frozen=True)
class Peer:
    """A library.

    Attributes:
        module: what is imported; package: its name on PyPI.
        used: what it is compared in.
    """

    module: str
    package: str
    used: str

    @property
    def version(self) -> str | None:
        """None where it is not installed."""
        if importlib.util.find_spec(self.module) is None:
            return None
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return "unknown version"


PEERS = (
    Peer("torch", "torch", "everything: eager and torch.compile"),
    Peer("liger_kernel", "liger-kernel", "norm, activation, rotary, loss"),
    Peer("quack", "quack-kernels", "norm, loss"),
    Peer("flash_attn", "flash-attn", "attention, norm"),
    Peer("xformers", "xformers", "attention"),
    Peer("transformers", "transformers", "fine-tuning"),
    Peer("tiktoken", "tiktoken", "tokenizer"),
    Peer("tokenizers", "tokenizers", "tokenizer"),
    Peer("gigatoken", "gigatoken", "tokenizer"),
    Peer("fastokens", "fastokens", "tokenizer"),
    Peer("splintr", "splintr-rs", "tokenizer"),
    Peer("bpe_openai", "bpe-openai", "tokenizer"),
)


def listing() -> str:
    """A line a peer: installed with its version, or missing."""
    lines = []
    for peer in PEERS:
        state = f"installed, {peer.version}" if peer.version else f"missing: pip install {peer.package}"
        lines.append(f"{peer.package:<16}{state:<36}{peer.used}")
    return "\n".join(lines)
