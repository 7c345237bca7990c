"""Pieces of text that readers take for whole, and the page made of them."""

import json
import re
from html.parser import HTMLParser

import pytest
import torch

import fastformer as ff
from fastformer.explain import Attribution, Passage, html, merge, plot, tokens_of
from fastformer.explain.tokens import is_boundary, pool, pool_map

TEXTS = [
    "Good hotel, 房间很小。",
    "很好吃😀😀, 👩‍👩‍👧 and 👍🏽!",
    "flags 🇩🇪🇫🇷, e\u0301te\u0301, ❤️\r\nnext  line",
    "日本語のテキスト한국어",
    "ไม่เป็นไร गाँव",
    "",
]
BYTES = ff.BPETokenizer.train(iter([]), 258, special_tokens=["[CLS]", "[SEP]"])  # a token a byte


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_of_byte_tokens_are_whole_characters(text):
    pieces = tokens_of(text, BYTES)
    assert "".join(piece.text for piece in pieces) == text
    assert [i for piece in pieces for i in piece.tokens] == list(range(len(text.encode())))
    regex = pytest.importorskip("regex")
    # With a token a byte, pieces are exactly what a reader takes for characters.
    wanted = regex.findall(r"\X", text)
    assert [piece.text for piece in pieces] == wanted


def test_boundaries_agree_with_unicodes():
    """Every pair and triple of characters of the kinds that matter; letters of Hangul and Indic conjuncts apart."""
    regex = pytest.importorskip("regex")
    kinds = [
        "a",
        " ",
        "\r",
        "\n",
        "\u0301",
        "很",
        "😀",
        "\u200d",
        "\ufe0f",
        "🏽",
        "🇩",
        "한",
        "❤",
        "\u200c",
        "1",
        "\u0e33",
    ]
    for a in kinds:
        for b in kinds:
            for c in kinds:
                text = f"x{a}{b}{c}"
                ends = {match.end() for match in regex.finditer(r"\X", text)}
                assert {i for i in range(1, len(text)) if is_boundary(text, i)} == ends - {len(text)}, text.encode()


def test_hugging_face_tokenizers_with_special_tokens(tmp_path):
    pytest.importorskip("transformers")
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    BYTES.save(tmp_path)
    fast = PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), cls_token="[CLS]", sep_token="[SEP]"
    )
    fast.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
    )
    pieces = tokens_of("a 很😀", fast)
    assert [piece.text for piece in pieces] == ["[CLS]", "a", " ", "很", "😀", "[SEP]"]
    assert [piece.special for piece in pieces] == [True, False, False, False, False, True]
    assert pieces[3].tokens == (3, 4, 5)
    cut = tokens_of("a 很😀", fast, truncation=True, max_length=5)
    assert [piece.text for piece in cut] == ["[CLS]", "a", " ", "很", "[SEP]"]


def test_pieces_gather_scores_and_maps():
    pieces = merge("很a", [(0, 1), (0, 1), (0, 1), (1, 2)])
    assert [piece.tokens for piece in pieces] == [(0, 1, 2), (3,)]
    assert pool(pieces, torch.tensor([1.0, 2.0, 3.0, -4.0])) == [6.0, -4.0]
    weights = torch.softmax(torch.randn(4, 4), -1)
    square = pool_map(pieces, weights)
    torch.testing.assert_close(square.sum(-1), torch.ones(2))
    assert float(square[1, 0]) == pytest.approx(float(weights[3, :3].sum()))
    assert float(square[0, 1]) == pytest.approx(float(weights[:3, 3].mean()))


def test_bad_pieces():
    with pytest.raises(ValueError, match="forward within the text"):
        merge("ab", [(1, 2), (0, 1)])
    with pytest.raises(ValueError, match="forward within the text"):
        merge("ab", [(0, 3)])
    with pytest.raises(TypeError, match="text must be a str"):
        tokens_of(b"ab", BYTES)
    with pytest.raises(TypeError, match="tokenizer must be"):
        tokens_of("ab", str)
    with pytest.raises(ValueError, match="4 tokens"):
        pool(tokens_of("abcd", BYTES), torch.ones(3))
    with pytest.raises(ValueError, match="4 tokens"):
        pool_map(tokens_of("abcd", BYTES), torch.ones(4, 3))


class Reader(HTMLParser):
    """Collects what a browser would show and run."""

    def __init__(self):
        super().__init__()
        self.tags, self.spans, self.shown, self.data, self._open = [], [], "", [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        is_token = tag == "span" and "tabindex" in dict(attributes)
        self._open.append("token" if is_token else dict(attributes).get("class", tag))
        if is_token:
            self.spans.append("")

    def handle_endtag(self, tag):
        self._open.pop()

    def handle_data(self, data):
        if "script" in self._open:
            self.data.append(data)
        if self._open and self._open[-1] == "token":
            self.spans[-1] += data
        if "text" in self._open:
            self.shown += data


def read(page):
    reader = Reader()
    reader.feed(page)
    return reader


HOSTILE = "</script><script>alert(1)</script> & <img src=x onerror=alert(1)> \"'><!-- 很😀"


def test_a_page_shows_text_as_it_is_and_runs_none_of_it(tmp_path):
    tokens = tokens_of(HOSTILE, BYTES)
    scores = torch.linspace(-1, 1, len(HOSTILE.encode()))
    values = {HOSTILE: scores, "map": torch.rand(len(scores), len(scores))}
    page = html(Passage(HOSTILE, tokens, values, caption=HOSTILE), tmp_path / "page.html", title=HOSTILE)
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page
    reader = read(page)
    assert [tag for tag, _ in reader.tags].count("script") == 2  # the data and the page's own
    assert not {"img", "link", "iframe"} & {tag for tag, _ in reader.tags}
    assert not re.search(r"https?://", page)
    assert HOSTILE in reader.shown
    assert reader.spans == [token.text for token in tokens]
    views = json.loads(reader.data[0])
    assert len(views[0]["scores"]) == len(views[1]["map"]) == len(tokens)


def test_a_page_of_chinese_emoji_spaces_and_special_tokens():
    text = "  很 好\n👩‍👩‍👧"
    tokens = merge(text, [(0, 0), (2, 3), (4, 5), (6, 11), (6, 11), (0, 0)], ["[CLS]", "", "", "", "", "[SEP]"])
    found = Attribution(torch.tensor([0.1, 0.5, -0.4, 0.2, 0.1, 0.0]), 1, 2.5, 2.0)
    reader = read(html([Passage(text, tokens, found), Passage("", [], torch.zeros(0))]))
    assert reader.spans == ["[CLS]", "很", "好", "👩‍👩‍👧", "[SEP]"]
    assert "[CLS]  很 好\n👩‍👩‍👧[SEP]" in reader.shown
    styles = [dict(a)["style"] for tag, a in reader.tags if tag == "span" and "tabindex" in a]
    assert styles[1] == "background-color:rgba(178,24,43,0.750)"
    assert styles[2] == "background-color:rgba(33,102,172,0.600)"
    assert "logit of class 1 is 2.5000, 2.0000 without" in html(Passage(text, tokens, found))


def test_lone_surrogates_do_not_stop_a_page(tmp_path):
    text = "a\ud800b"
    html(Passage(text, merge(text, [(0, 1), (1, 2), (2, 3)]), torch.ones(3)), tmp_path / "p.html")
    assert "a" in (tmp_path / "p.html").read_text(encoding="utf-8")


def test_bad_pages():
    tokens = tokens_of("ab", BYTES)
    for values, error in (
        (torch.ones(3), ValueError),
        ("high", TypeError),
        ({}, ValueError),
        (torch.ones(2, 2, 2), TypeError),
    ):
        with pytest.raises(error, match=r"values|scores"):
            html(Passage("ab", tokens, values))
    with pytest.raises(ValueError, match="pieces of the passage's text"):
        html(Passage("xy", tokens, torch.ones(2)))
    with pytest.raises(ValueError, match="at least one passage"):
        html([])


def test_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    tokens = tokens_of("$a 很😀$", BYTES)
    count = len("$a 很😀$".encode())
    figure = plot(torch.randn(count), tokens, path=tmp_path / "bars.png", title="scores")
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == [r"\$", "a", "␣", "很", "😀", r"\$"]
    assert len(figure.axes[0].patches) == len(tokens)
    assert pytest.approx(1.0) == plot(torch.ones(1), tokens[:1]).axes[0].patches[0].get_height()
    figure = plot(torch.rand(count, count), tokens, path=tmp_path / "map.png")
    assert figure.axes[0].images[0].get_array().shape == (6, 6)
    assert all((tmp_path / name).stat().st_size > 2000 for name in ("bars.png", "map.png"))
    with pytest.raises(TypeError, match="values must be"):
        plot(torch.rand(1, 2, 3), tokens)
