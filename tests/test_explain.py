"""Attributions have the exact sum, belong to whole words, and matter; the page is one safe file."""

import dataclasses
import html.parser
import math
import re

import numpy as np
import pytest
import torch
from conftest import WORDS, sentences
from test_model import randomize

import explain
import predict
from analysis.html_page import attention_maps, split_into_pieces
from files import model_folder
from files.disk import UserError
from files.tokenizer import train_tokenizer
from model import Classifier, Config

MODERN = Config(
    vocab_size=300, d_model=32, n_layers=3, n_heads=2, d_ff=48, max_len=40, local_attention=6,
    global_attn_every_n_layers=2,
)  # fmt: skip
CONFIGS = {"modern": MODERN, "bert": dataclasses.replace(MODERN, family="bert", norm_eps=1e-12)}
each_family = pytest.mark.parametrize("family", CONFIGS)
TEXTS = [
    f"{WORDS[0]}, {WORDS[9]}{WORDS[3]} & <b>{WORDS[30]}</b>!",
    f"{WORDS[1]}qqq",
    "é ü [MASK] 你好 x",
]


def random_classifier(family, n_labels):
    """A classifier with weights large enough for different answers, and its tokenizer."""
    tokenizer = train_tokenizer([*sentences(100, 1), *WORDS], 300)
    config = dataclasses.replace(CONFIGS[family], vocab_size=tokenizer.get_vocab_size())
    return randomize(Classifier(config, n_labels)), tokenizer


def logits_of(model, rows):
    starts = torch.tensor([0, *map(len, rows)]).cumsum(0).int()
    ids = torch.cat([torch.from_numpy(row[:, 0]) for row in rows])
    with torch.no_grad():
        return model(ids, starts, max(map(len, rows)))


@each_family
@pytest.mark.parametrize("n_labels", (1, 2, 4))
def test_attributions_sum_to_the_difference_of_the_answers(family, n_labels):
    model, tokenizer = random_classifier(family, n_labels)
    names = [f"class {i}" for i in range(n_labels)] if n_labels > 1 else None
    for text in TEXTS:
        explanation = explain.explain(model, tokenizer, names, text)
        blank = explanation.row.copy()
        blank[1:-1, 0] = tokenizer.token_to_id("[MASK]")
        logits = logits_of(model, [explanation.row, blank])
        if names:
            p = logits.softmax(-1)[:, int(logits[0].argmax())].double()
            assert explanation.answer == f"class {int(logits[0].argmax())} {p[0]:.3f}"
            change = float((p / (1 - p)).log().diff().neg())
        else:
            change = float(logits[0, 0] - logits[1, 0])
        total = np.abs(explanation.attributions).sum()
        assert total > 0.01
        assert abs(explanation.attributions.sum() - change) <= (explain.MAX_GAP + 1e-3) * total
        assert explanation.gap <= explain.MAX_GAP


def test_any_class_can_be_explained():
    model, tokenizer = random_classifier("modern", 2)
    first, second = (explain.explain(model, tokenizer, ["a", "b"], TEXTS[0], i) for i in (0, 1))
    assert np.allclose(first.attributions, -second.attributions, atol=1e-4)


@each_family
def test_spans_and_tokens_are_those_of_whole_words(family):
    model, tokenizer = random_classifier(family, 2)
    for text in TEXTS:
        explanation = explain.explain(model, tokenizer, ["a", "b"], text)
        words = [text[first:last] for first, last in explanation.spans]
        assert words == re.findall(r"\[MASK\]|[你好]|\w+|[^\w\s]", text)
        assert np.concatenate(explanation.tokens).tolist() == list(
            range(1, len(explanation.row) - 1)
        )
        assert "".join(piece for piece, _ in split_into_pieces(explanation)) == text
    long = " ".join(WORDS[i % len(WORDS)] for i in range(90))
    explanation = explain.explain(model, tokenizer, ["a", "b"], long)  # is cut to head and tail
    assert (
        len(explanation.row) == 40
        and explanation.spans[0][0] == 0
        and explanation.spans[-1][1] == len(long)
    )
    assert [text for text, _ in split_into_pieces(explanation)][1] == WORDS[0]
    assert "".join(piece for piece, _ in split_into_pieces(explanation)) == long


@each_family
def test_attention_maps_times_values_are_the_output_of_attention(family):
    model, tokenizer = random_classifier(family, 2)
    explanation = explain.explain(model, tokenizer, ["a", "b"], TEXTS[0] * 2)
    maps = attention_maps(model, explanation.row)
    qkvs, outputs = [], []
    for layer in model.model.layers:
        layer.attn.Wqkv.register_forward_hook(lambda _, __, qkv: qkvs.append(qkv))
        layer.attn.Wo.register_forward_hook(lambda _, inputs, __: outputs.append(inputs[0]))
    logits_of(model, [explanation.row])
    for weights, qkv, output in zip(maps, qkvs, outputs, strict=True):
        values = qkv.unflatten(-1, (3, 2, 16))[:, 2].transpose(0, 1)  # (H, L, D)
        heads = (weights @ values).transpose(0, 1).flatten(1)
        torch.testing.assert_close(heads, output, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:2]))
    if family == "modern":
        assert not maps[1][:, 0, 4:].any() and maps[0][:, 0, 4:].any()


# -------------------------------------------------------------------------------- the script


def test_removing_attributed_words_changes_more_than_removing_random_words(
    finetuned, monkeypatch, tmp_path, capsys
):
    lines = tmp_path / "lines.txt"
    lines.write_text("\n".join(s for topic in range(3) for s in sentences(20, 300 + topic, topic)))
    flags = ["--model", str(finetuned[0]), "--check", "--file", str(lines), "--sentences", "40"]
    results = explain.main(flags)
    low, high = results["interval"]
    assert 0 < low < results["difference"] < high
    sentence = (
        f"Removing attributed words lowers the probability by {results['difference']:.3f} more "
        f"than removing random words (95% CI {low:.3f} to {high:.3f})."
    )
    assert capsys.readouterr().out.splitlines()[-1] == sentence
    attributed, random = np.array(results["attributed"]), np.array(results["random"])
    assert attributed[0] == pytest.approx(random[0], abs=1e-6)
    assert results["difference"] == pytest.approx((random - attributed)[1:].mean(), abs=1e-6)

    original, rng = explain.explain, np.random.default_rng(0)

    def shuffled(*args):
        explanation = original(*args)
        return explanation._replace(attributions=rng.permutation(explanation.attributions))

    monkeypatch.setattr(explain, "explain", shuffled)
    low_shuffled, high_shuffled = explain.main(flags)["interval"]
    assert low_shuffled < results["difference"] / 2 and high_shuffled < high


class Page(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags = []
        self.text = ""
        self.sources = []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def test_the_page_is_one_file_without_a_script(finetuned, tmp_path):
    text = f"<script>alert(1)</script> {WORDS[0]} & {WORDS[1]}"
    path = tmp_path / "page.html"
    explain.main(["--model", str(finetuned[0]), "--html", str(path), text, WORDS[4]])
    page = Page()
    page.feed(path.read_text())
    assert "script" not in page.tags and text in page.text and "url(" not in path.read_text()
    assert page.sources and all(
        source.startswith("data:image/png;base64,") for source in page.sources
    )
    config = model_folder.load_model(finetuned[0])[0]
    assert len(page.sources) == 2 * config.n_layers * config.n_heads


def test_answers_are_those_of_predict(finetuned, capsys):
    texts = sentences(5, 400)
    explain.main(["--model", str(finetuned[0]), *texts])
    explained = capsys.readouterr().out.splitlines()
    predict.main(["--model", str(finetuned[0]), "--dtype", "float32", *texts])
    for mine, other in zip(explained, capsys.readouterr().out.splitlines(), strict=True):
        (name, p), (their_name, their_p) = (
            line.split("\t")[0].rsplit(" ", 1) for line in (mine, other)
        )
        assert name == their_name and math.isclose(float(p), float(their_p), abs_tol=2e-3)


@pytest.mark.parametrize(
    "which, flags, message",
    (
        ("pretrained", ["a"], "not a classifier"),
        ("finetuned", ["--class", "nobody", "a"], "--class nobody"),
        ("finetuned", ["a", " "], "text 2: no text"),
        ("finetuned", ["a", "--html", "/nowhere/page.html"], "/nowhere/page.html"),
        ("finetuned", ["--check", "--file", "/nowhere/lines.txt"], "/nowhere/lines.txt"),
    ),
)
def test_bad_input_is_an_error_of_one_line(pretrained, finetuned, which, flags, message):
    folder = pretrained if which == "pretrained" else finetuned[0]
    with pytest.raises(UserError, match=message):
        explain.main(["--model", str(folder), *flags])


@pytest.mark.parametrize("flags", ([], ["--check", "text"]))
def test_texts_or_a_check(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        explain.main(flags)
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1
