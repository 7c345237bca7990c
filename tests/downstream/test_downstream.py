"""What a dependent project does with an installed fastformer: operators, tokenizer, patching a model."""

import importlib.metadata
import subprocess
import sys

import pytest
import torch

import fastformer as ff

TEXT = ["the cat sat on the mat", "a dog — naïve, 日本語, 🙂 — barked at the cat", "  spaces\tand\nlines  ", ""] * 20


def test_version_is_the_distribution_s():
    assert importlib.metadata.version("fastformer") == ff.__version__


def test_types_are_advertised():
    assert any(str(path).endswith("fastformer/py.typed") for path in importlib.metadata.files("fastformer"))


def test_importing_is_light():
    code = "import sys, fastformer; print(sorted({'triton', 'transformers', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_attention_equals_pytorch():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 17, 16, requires_grad=True) for _ in range(3))
    ours = ff.ops.scaled_dot_product_attention(q, k, v, is_causal=True)
    stock = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(ours, stock)
    for a, b in zip(
        torch.autograd.grad(ours.sum(), [q, k, v]), torch.autograd.grad(stock.sum(), [q, k, v]), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_add_layer_norm_equals_pytorch():
    x, residual = torch.randn(3, 5, 32), torch.randn(3, 5, 32)
    weight, bias = torch.randn(32), torch.randn(32)
    ours = ff.ops.add_layer_norm(x, residual, weight, bias)
    stock = torch.nn.functional.layer_norm(x + residual, (32,), weight, bias)
    torch.testing.assert_close(ours, stock)


def test_tokenizer_trains_encodes_and_decodes(tmp_path):
    tokenizer = ff.BPETokenizer.train(TEXT, vocab_size=300, pattern="gpt2")
    for text in TEXT[:4]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    tokenizer.save(tmp_path / "tokenizer.json")
    again = ff.BPETokenizer.from_file(tmp_path / "tokenizer.json")
    assert [again.encode(text) for text in TEXT] == [tokenizer.encode(text) for text in TEXT]


def test_bert_is_patched_and_unpatched():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config).eval()
    ids = torch.randint(0, 100, (3, 12))
    mask = torch.arange(12)[None] < torch.tensor([12, 5, 1])[:, None]
    batch = {"input_ids": ids, "attention_mask": mask.long()}
    with torch.no_grad():
        stock = model(**batch).logits
        report = ff.patch(model)
        patched = model(**batch).logits
        ff.unpatch(model)
        restored = model(**batch).logits
    assert str(report)
    torch.testing.assert_close(patched, stock, atol=1e-5, rtol=1e-5)
    assert torch.equal(restored, stock)


def test_command_line():
    out = subprocess.run([sys.executable, "-m", "fastformer.cli", "info"], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert ff.__version__ in out.stdout
