"""Counting kernel launches, against counts done by hand."""

import json
from collections import Counter

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import fastformer as ff
from fastformer.cli import main
from fastformer.launches import compare, count_launches
from fastformer.launches.cost import multi_tensor_launches

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _compiler(interpreting):
    if interpreting:
        pytest.skip("launches are counted of Triton's compiler")


class Toy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(8, 8) for _ in range(2)])
        self.norm = torch.nn.LayerNorm(8)

    def forward(self, x):
        for layer in self.layers:
            x = torch.nn.functional.dropout(layer(x), 0.1)
        return self.norm(x)


def test_a_toy_by_hand():
    model = Toy()
    x = torch.randn(4, 8)
    count = count_launches(model, lambda: model(x).sum().backward())
    phases, parts = count.by_phase(), count.by_layer()
    # Two of (addmm, dropout), one norm; the sum stands outside the model.
    assert phases["forward"] == 5
    assert phases["loop"] == 2  # the sum, and the one its backward starts from
    # Weights and biases, and of the second layer the input; dropout is the model's own.
    assert parts["layers.*", "backward"] == 2 * 2 + 1
    assert parts["(model)", "backward"] == 2
    assert parts["norm", "backward"] == 2
    assert count.by_operator()["native_dropout"] == 2
    assert count.host_reads == 0


def test_attention_is_one_kernel_and_a_host_read_is_seen():
    model = torch.nn.Linear(8, 8)
    x = torch.randn(2, 2, 4, 8, requires_grad=True)

    def step():
        y = scaled_dot_product_attention(x, x, x, attn_mask=torch.zeros(4, 4), dropout_p=0.1)
        y.backward(torch.ones_like(y))
        x.sum().item()

    count = count_launches(model, step)
    found = count.by_operator()
    assert found["scaled_dot_product_attention"] == 1
    assert found["scaled_dot_product_attention_backward"] == 2
    assert found["add"] == 2  # three gradients of one tensor
    assert count.host_reads == 1


def test_fastformer_kernels_are_counted_one_by_one():
    norm = torch.nn.LayerNorm(8)
    x, residual = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)

    def step():
        y = ff.ops.add_layer_norm(x, residual, norm.weight, norm.bias, dropout_p=0.5)
        y.backward(torch.ones_like(y))

    count = count_launches(norm, step)
    ours = {name: n for name, n in count.by_operator().items() if name.startswith("fastformer::")}
    assert sum(ours.values()) == 3, ours  # forward, backward, and the partial rows' sum
    assert count.by_operator()["randint"] == 1


@pytest.mark.parametrize(
    ("sizes", "lists", "expected"),
    [
        ([], 1, 0),
        ([0, 0], 1, 0),
        ([5], 1, 1),
        ([5] * 110, 1, 1),
        ([5] * 111, 1, 2),
        ([5] * 37, 4, 2),
        ([65536 * 320], 2, 1),
        ([65536 * 320 + 1], 2, 2),
    ],
)
def test_multi_tensor_launches(sizes, lists, expected):
    assert multi_tensor_launches(sizes, lists) == expected


def _compare(dtype, autocast=None):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64
    )
    model = transformers.BertForSequenceClassification(config).train().to(dtype)
    mask = torch.ones(4, 16, dtype=torch.long)
    mask[1:, 10:] = 0
    batch = {"input_ids": torch.randint(3, 50, (4, 16)), "attention_mask": mask, "labels": torch.tensor([0, 1, 0, 1])}
    return compare(model, batch, autocast=autocast), model


@pytest.fixture(scope="module")
def compared():
    return _compare(torch.bfloat16)


def test_autocast_by_hand(compared):
    """What autocast adds to a stock layer: twelve parameters and four inputs rounded, their gradients rounded back,
    residuals' fp32 gradients rounded for the two branches. To a patched one: a launch each way."""
    found = _compare(torch.float32, torch.bfloat16)[0]
    names = ("bert.encoder.layer.*", "forward"), ("bert.encoder.layer.*", "backward")
    plain, under = ([count.stock.by_layer()[name] for name in names] for count in (compared[0], found))
    assert [a - b for a, b in zip(under, plain, strict=True)] == [3 * 16, 3 * (16 + 2)]
    plain, under = ([count.patched.by_layer()[name] for name in names] for count in (compared[0], found))
    assert [a - b for a, b in zip(under, plain, strict=True)] == [3, 3]
    # The loss is fp32: logits are rounded up, their gradient down.
    assert found.stock.by_layer()["(model)", "forward"] == compared[0].stock.by_layer()["(model)", "forward"] + 1
    assert found.share < 0.4


def test_a_layer_in_single_precision_by_hand():
    patched = _compare(torch.float32)[0].patched.by_layer()
    # PyTorch's products for weights; one launch sums biases and norms. Attention's backward is two kernels.
    assert patched["bert.encoder.layer.*", "backward"] == 3 * (2 + 1 + 2 + 4 + 4 + 1)


def test_a_stock_bert_layer_by_hand(compared):
    stock = compared[0].stock.by_layer()
    # Six linear layers, attention and the copy behind it, two of (dropout, add, norm), gelu.
    assert stock["bert.encoder.layer.*", "forward"] == 3 * (6 + 2 + 2 * 3 + 1)
    # Linear layers: two products and a bias each. Norms two, dropouts, residuals and query/key/value one gradient each.
    assert stock["bert.encoder.layer.*", "backward"] == 3 * (6 * 3 + 2 + 2 * 2 + 2 + 1 + 2 + 2) + 3 * 3


def test_patched_launches_fewer_kernels_and_reads_the_lengths_once(compared):
    found, model = compared
    patched = found.patched.by_layer()
    # Four products, attention, two norms and gelu; the seeds of all layers are drawn by the first dropout, before them.
    assert patched["bert.encoder.layer.*", "forward"] == 3 * 8
    # Norms, gelu and attention of short sequences, four products of inputs; all parameters' gradients in one.
    assert patched["bert.encoder.layer.*", "backward"] == 3 * (2 + 1 + 1 + 4 + 1)
    assert found.patched.by_operator()["randint"] == 1
    # Attention, gelu, two norms a layer; facts, places, ids, padding back; embeddings; loss and its mean.
    ours = Counter(launch.operator for launch in found.patched.launches if launch.phase == "forward")
    assert sum(n for name, n in ours.items() if name.startswith("fastformer::")) == 3 * 4 + 4 + 1 + 2
    assert found.patched.host_reads == 1
    assert sum(number for *_, number in found.left()) == found.patched.total
    assert type(model.bert).__module__.startswith("transformers")
    text = str(found)
    assert "left when patched" in text
    assert "all weights, biases and norms of a layer" in text
    assert f"{found.share:.0%}" in text


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        count_launches(3, lambda: None)
    with pytest.raises(ValueError, match="model must be on the CPU or one GPU to be counted, got parameters on meta"):
        count_launches(torch.nn.Linear(2, 2, device="meta"), lambda: None)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    model = transformers.BertForSequenceClassification(config)
    with pytest.raises(ValueError, match="labels are missing"):
        compare(model, {"input_ids": torch.ones(1, 4, dtype=torch.long)})


def test_command(capsys, monkeypatch):
    monkeypatch.setattr("fastformer.launches.command._model", _tiny)
    assert main(["info", "--step", "bert", "--layers", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0 < found["patched"]["launches"] < found["stock"]["launches"]
    assert sum(row["launches"] for row in found["left"]) == found["patched"]["launches"]
    assert all(row["reason"] for row in found["left"])
    assert main(["info", "--step", "bert", "--layers", "2", "--autocast", "bfloat16", "--json"]) == 0
    under = json.loads(capsys.readouterr().out)
    assert under["share"] < found["share"]
    assert main(["info", "--step", "bert"]) == 0
    assert "Kernel launches of one training step" in capsys.readouterr().out


def _tiny(name, layers):
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=layers or 1, num_attention_heads=2, intermediate_size=64
    )
    return transformers.BertForSequenceClassification(config).train()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step", "no-such-model"], "neither a folder with a checkpoint nor a family"),
        (["--step", ".", "--layers", "2"], "--layers is for families"),
        (["--step", "."], ": "),
        (["--layers", "2"], "--layers goes with --step"),
        (["--dtype", "float32"], "--dtype goes with --step"),
        (["--autocast", "bfloat16"], "--autocast goes with --step"),
        (["--step", "bert", "--autocast", "float16", "--dtype", "bfloat16"], "--autocast is for parameters of --dtype"),
        (["--step", "sam"], "no family of text classifiers"),
    ],
)
def test_command_on_bad_input(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["info", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
