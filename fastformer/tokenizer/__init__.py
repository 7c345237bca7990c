"""Byte-level BPE: exact, linear in every input, in C++.

>>> from fastformer.tokenizer import BPETokenizer
>>> tok = BPETokenizer.from_file("cl100k_base.tiktoken", pattern="cl100k")
>>> tok.decode(tok.encode("Hello world"))
'Hello world'
"""

from fastformer.tokenizer.bpe import BPETokenizer

__all__ = ["BPETokenizer"]
