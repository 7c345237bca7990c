"""FastTokenizer against transformers' own over the same tokenizer.json."""

import pickle
import warnings

import pytest
import torch

import fastformer as ff

transformers = pytest.importorskip("transformers", minversion="5")
tokenizers = pytest.importorskip("tokenizers")
import zoo  # noqa: E402

from fastformer.integrations.transformers import FastTokenizer  # noqa: E402

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "",
    "  two  spaces,\n\tand tabs; 12345 it's",
    "Grüße, 你好, 🙂🙂 é é",
    "a <s> special </s> one, <pad> too <extra>",
    "word " * 40,
]
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


@pytest.fixture(scope="module", params=[False, True], ids=["bare", "template"])
def pair(request, tmp_path_factory):
    """(stock, ours) from one file; with a template every text gets <s> and </s>."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    ff.BPETokenizer.train(TEXTS * 4, 400, special_tokens=["<pad>", "<s>", "</s>", "<unk>"]).save(path)
    backend = tokenizers.Tokenizer.from_file(str(path))
    if request.param:
        ids = [(name, backend.token_to_id(name)) for name in ("<s>", "</s>")]
        backend.post_processor = tokenizers.processors.Sequence(
            [
                tokenizers.processors.ByteLevel(trim_offsets=False),
                tokenizers.processors.TemplateProcessing(
                    single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=ids
                ),
            ]
        )
        backend.save(str(path))
    make = {"tokenizer_file": str(path), **SPECIAL}
    stock, ours = transformers.PreTrainedTokenizerFast(**make), FastTokenizer(**make)
    return stock, ours


def plain(encoding):
    return {name: value.tolist() if hasattr(value, "tolist") else value for name, value in encoding.items()}


ASKED = [
    {},
    {"padding": True},
    {"padding": True, "return_tensors": "pt"},
    {"padding": True, "return_tensors": "np", "pad_to_multiple_of": 8},
    {"padding": "max_length", "max_length": 9, "truncation": True},
    {"padding": "max_length", "max_length": 16, "truncation": True, "pad_to_multiple_of": 8, "return_tensors": "pt"},
    {"padding": "max_length", "max_length": 9},
    {"truncation": True, "max_length": 5},
    {"truncation": True, "max_length": 2},
    {"add_special_tokens": False, "truncation": True, "max_length": 3},
    {"return_attention_mask": False, "return_token_type_ids": True, "padding": True},
    {"padding": True, "padding_side": "left"},
    {"return_offsets_mapping": True, "padding": True},
    {"return_overflowing_tokens": True, "truncation": True, "max_length": 6},
    {"return_special_tokens_mask": True},
    {"return_length": True},
    {"split_special_tokens": True},
]


@pytest.mark.parametrize("asked", ASKED, ids=str)
def test_batches_equal_stock(pair, asked):
    stock, ours = pair
    a, b = stock(TEXTS, **asked), ours(TEXTS, **asked)
    assert list(a) == list(b)
    assert plain(a) == plain(b)
    assert {name: type(value) for name, value in a.items()} == {name: type(value) for name, value in b.items()}


@pytest.mark.parametrize("side", ["left", "right"])
def test_truncation_side(pair, side):
    stock, ours = pair
    stock.truncation_side = ours.truncation_side = side
    try:
        assert plain(stock(TEXTS, truncation=True, max_length=5)) == plain(ours(TEXTS, truncation=True, max_length=5))
    finally:
        stock.truncation_side = ours.truncation_side = "right"


def test_what_stock_refuses_is_refused(pair):
    for tokenizer in pair:
        with pytest.raises(ValueError, match="not a multiple"):
            tokenizer(TEXTS, padding="max_length", max_length=12, truncation=True, pad_to_multiple_of=8)


def test_one_text_pairs_words_and_decoding(pair):
    stock, ours = pair
    for text in TEXTS:
        assert plain(stock(text)) == plain(ours(text))
        assert plain(stock(text, return_tensors="pt")) == plain(ours(text, return_tensors="pt"))
        assert stock.encode(text) == ours.encode(text)
        assert stock.tokenize(text) == ours.tokenize(text)
        assert stock.decode(stock.encode(text)) == ours.decode(ours.encode(text))
    assert plain(stock(TEXTS[0], TEXTS[3])) == plain(ours(TEXTS[0], TEXTS[3]))
    words = [["two", "words"], ["one"]]
    assert plain(stock(words, is_split_into_words=True)) == plain(ours(words, is_split_into_words=True))


def test_the_engine_runs_and_encodings_come_when_asked_for(pair, monkeypatch):
    stock, ours = pair
    calls = []
    slow = transformers.PreTrainedTokenizerFast._encode_plus
    monkeypatch.setattr(
        transformers.PreTrainedTokenizerFast, "_encode_plus", lambda *a, **k: calls.append(1) or slow(*a, **k)
    )
    encoding = ours(TEXTS, padding=True)
    assert not calls
    assert encoding.is_fast
    want = stock(TEXTS, padding=True)
    assert encoding.tokens(0) == want.tokens(0)
    assert encoding.word_ids(2) == want.word_ids(2)
    assert encoding.char_to_token(0, 5) == want.char_to_token(0, 5)
    assert encoding[0].ids == want[0].ids


def test_added_tokens_are_noticed(tmp_path, pair):
    ours = pickle.loads(pickle.dumps(pair[1]))
    before = ours("see <extra> here")["input_ids"]
    ours.add_tokens(["<extra>"])
    ours.save_pretrained(tmp_path)
    stock = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert ours("see <extra> here")["input_ids"] == stock("see <extra> here")["input_ids"] != before


def test_save_load_pickle_and_twin(tmp_path, pair):
    stock, ours = pair
    want = plain(stock(TEXTS, padding=True))
    ours.save_pretrained(tmp_path)
    loaded = FastTokenizer.from_pretrained(tmp_path)
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
    twin, copied = FastTokenizer.of(stock), pickle.loads(pickle.dumps(ours))
    for tokenizer in (loaded, auto, twin, copied):
        assert plain(tokenizer(TEXTS, padding=True)) == want
        assert tokenizer.pad_token == "<pad>"
    assert isinstance(loaded, FastTokenizer)
    encoding = pickle.loads(pickle.dumps(ours(TEXTS, padding=True)))
    assert plain(encoding) == want


def test_collator_and_pipeline(pair):
    stock, ours = pair
    rows = [ours(text) for text in TEXTS if text]
    a, b = (transformers.DataCollatorWithPadding(tok)(rows) for tok in (stock, ours))
    assert plain(a) == plain(b)
    model = zoo.build("distilbert", "ForSequenceClassification", vocab_size=500, max_position_embeddings=200).eval()
    make = transformers.pipeline
    answers = [make("text-classification", model=model, tokenizer=tok)(TEXTS[0]) for tok in (stock, ours)]
    assert answers[0] == answers[1]


def test_other_vocabularies_go_the_stock_way():
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0, "hello": 1, "[PAD]": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    ours = FastTokenizer(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]")
    with pytest.warns(UserWarning, match="own tokenizer: .*WordPiece"):
        assert ours(["hello you"])["input_ids"] == [[1, 0]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ours(["hello"])["input_ids"] == [[1]]
    with pytest.raises(TypeError, match="tokenizer must be"):
        FastTokenizer.of("gpt2")


def test_tensors_are_the_callers_own(pair):
    ours = pair[1]
    batch = ours(TEXTS, padding=True, return_tensors="pt")
    assert all(value.dtype == torch.int64 for value in batch.values())
    batch["input_ids"].zero_()
    assert ours(TEXTS, padding=True, return_tensors="pt")["input_ids"].any()
