"""Token labels: files, the alignment of tags and tokens, entities, their scores, the scripts."""

import itertools
import json
import random

import numpy as np
import pytest
import torch
import transformers
from conftest import FAST, WORDS
from hypothesis import given
from hypothesis import strategies as st
from seqeval.metrics import f1_score, precision_score, recall_score
from seqeval.metrics.sequence_labeling import get_entities
from test_data import byte_level_bpe, long_word_documents, sentencepiece, wordpiece
from test_hub_names import their_folder
from test_labels import PROPERTY
from test_model import load_theirs

import finetune
import predict
from files import entities, model_folder
from files.disk import UserError
from files.entities import (
    TaggedDataset,
    encode_words,
    entity_f1,
    load,
    most_frequent_tags,
    predict_entities,
    read_sentences,
    token_targets,
    word_spans,
)
from model import Tagger

NAMES, PLACES = WORDS[:6], WORDS[6:12]


def tagged(n, seed):
    """Sentences: a name after "bal" is a person, alone it is a thing; places have two words."""
    rng, sentences = random.Random(seed), []
    for _ in range(n):
        words, tags = [], []
        for _ in range(rng.randint(2, 7)):
            kind = rng.random()
            if kind < 0.3:
                words += [WORDS[20], rng.choice(NAMES)]
                tags += ["O", "B-PER"]
            elif kind < 0.5:
                words += [WORDS[21], rng.choice(NAMES)]
                tags += ["O", "O"]
            elif kind < 0.7:
                words += rng.sample(PLACES, 2)
                tags += ["B-LOC", "I-LOC"]
            else:
                words.append(rng.choice(WORDS[24:]))
                tags.append("O")
        sentences.append((words, tags))
    return sentences


def write_conll(path, sentences):
    lines = ["-DOCSTART- -X- O", ""]
    for words, tags in sentences:
        lines += [f"{word} NN {tag}" for word, tag in zip(words, tags, strict=True)] + [""]
    path.write_text("\n".join(lines))
    return path


def write_jsonl(path, sentences):
    path.write_text("".join(json.dumps({"words": w, "tags": t}) + "\n" for w, t in sentences))
    return path


# ---------------------------------------------------------------------------- files


def test_columns_and_jsonl_hold_the_same_sentences(tmp_path):
    sentences = tagged(20, 0)
    for path in (
        write_conll(tmp_path / "a.conll", sentences),
        write_jsonl(tmp_path / "a.jsonl", sentences),
    ):
        assert list(zip(*read_sentences(path), strict=True)) == sentences
        train, test = load(path, None)
        assert (len(train), len(test)) == (16, 4)
        assert train.names == ["O", "B-LOC", "B-PER", "I-LOC", "I-PER"]
        assert list(zip(test.words, test.targets, strict=True)) == sentences[16:]


@pytest.mark.parametrize(
    ("content", "message"),
    (
        ("a B-X\nb\n", ":2: one column"),
        ("a B-X\nb PER\n", ":2: tag 'PER'"),
        ("a B-\n", ":1: tag 'B-'"),
        ("a Q-X\n", ":1: tag 'Q-X'"),
        ("a B-X\n", "there is no example to hold out"),
        ("a O\nb O\n", "nothing to learn"),
        ("\n\n", "no sentences"),
        ("", "no sentences"),
    ),
)
def test_bad_columns(tmp_path, content, message):
    (tmp_path / "a.conll").write_text(content)
    with pytest.raises(UserError) as error:
        load(tmp_path / "a.conll", None)
    assert str(error.value).startswith((str(tmp_path / "a.conll"), "there is no example"))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("row", "message"),
    (
        (
            {"words": ["a"], "tags": ["B-X", "O"]},
            ":2: the fields 'words' and 'tags' must be equally long lists",
        ),
        ({"words": ["a"]}, ":2: the fields 'words' and 'tags' must be equally long lists"),
        (
            {"words": ["a"], "tags": "B-X"},
            ":2: the fields 'words' and 'tags' must be equally long lists",
        ),
        (
            {"words": ["a", 3], "tags": ["O", "O"]},
            ":2: the fields 'words' and 'tags' must be equally long lists",
        ),
        ({"words": ["a"], "tags": ["Q-X"]}, ":2: tag 'Q-X' is none of O, B-TYPE and I-TYPE"),
        ({"tokens": ["a"], "ner_tags": [3]}, ":2: .* the tags by name, such as B-PER"),
    ),
)
def test_bad_rows(tmp_path, row, message):
    good = {"words": ["a"], "tags": ["B-X"]}
    (tmp_path / "a.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(UserError, match=message):
        load(tmp_path / "a.jsonl", None)


COLUMNS = {  # of (Anna, B-PER) (去, O) or of words that are odd
    "numbered, as CoNLL-U": ("1\tAnna\tB-PER\n2\t去\tO\n\n1\tx\tO\n", "Anna 去 x"),
    "numbers that are words": ("1 Anna B-PER\n1 去 O\n", "1 1"),
    "numbers in two columns": ("1 B-X\n2 O\n", "1 2"),
    "comments": ("# id 7\nAnna B-PER\n# text = O B\n去 O\n# O\n", "Anna 去 #"),
    "an ideographic space": ("Anna B-PER\n\u3000 O\n去 O\n", "Anna \u3000 去"),
    "no-break spaces": ("Anna\xa0B B-PER\n去\u2028 O\n", "Anna\xa0B 去\u2028"),
    "tabs and spaces": ("Anna B\t_\tB-PER\n去 \t_\t O\n", "Anna_B 去"),
    "Windows": ("\ufeffAnna B-PER\r\n去 O\r\n\r\n", "Anna 去"),
}


@pytest.mark.parametrize("kind", COLUMNS)
def test_the_words_of_columns(tmp_path, kind):
    content, words = COLUMNS[kind]
    path = tmp_path / "a.conll"
    path.write_text(content, encoding="utf-8", newline="")
    read, tags = (list(itertools.chain(*lists)) for lists in read_sentences(path))
    assert read == [word.replace("_", " ") for word in words.split(" ")]
    assert [tag[0] for tag in tags] == ["B", *"O" * (len(read) - 1)]


def test_a_word_of_json_may_be_blank(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", [([" ", "bal", ""], ["O", "B-X", "O"])])
    train, _ = load(path, path)
    encoded, places, _ = encode_words(train.words, tokenizer, 20)
    assert places[0] == [[], [1], []]
    [target] = token_targets(encoded, places, train)
    assert entities.word_tags(target, places[0], train.names) == ["O", "B-X", "O"]


def test_held_out_sentences_do_not_stand_in_training(tmp_path):
    sentences = [([f"w{i % 17}"], ["B-X"]) for i in range(20)]
    train, test = load(write_conll(tmp_path / "a.conll", sentences), None)
    assert len(train) == 16 and test.words == [["w16"]]


def test_a_tag_that_training_never_saw(tmp_path):
    train = write_conll(tmp_path / "train.conll", tagged(5, 0))
    (tmp_path / "test.conll").write_text("a B-NEW\n")
    with pytest.raises(
        UserError, match=r"test.conll:1: tag 'B-NEW' is none of the training tags O, B-LOC"
    ):
        load(train, tmp_path / "test.conll")


# ---------------------------------------------------------------------------- tokens and entities


@pytest.fixture(scope="module")
def tokenizer(pretrained):
    return model_folder.load_model(pretrained)[2]


def test_tags_stand_at_first_pieces(tokenizer):
    words = [["bal", "balqqdom", "\u200b", "x.y", "dom"], ["ki"] * 30]
    rows, places, n_cut = encode_words(words, tokenizer, 20)
    assert n_cut == 1 and [len(row) for row in rows][1] == 20
    names = [str(i) for i in range(30)]
    targets = token_targets(rows, places, TaggedDataset(words, [names[:5], names], names))
    for sentence, row, target in zip(words, rows, targets, strict=True):
        at = 1
        expected = np.full(len(row), entities.NOT_SCORED)
        for i, word in enumerate(sentence):
            pieces = tokenizer.encode(word, add_special_tokens=False).ids
            if pieces and at < len(row) - 1:
                expected[at] = i
            assert (
                row[at : at + len(pieces), 0].tolist() == pieces[: len(row) - 1 - at]
                or at >= len(row) - 1
            )
            at += len(pieces)
        assert target.tolist() == expected.tolist()


@pytest.mark.parametrize("make", (wordpiece, byte_level_bpe, sentencepiece))
def test_a_text_is_split_into_words_as_its_tokenizer_splits_it(make):
    text = "  bal dom,\tkist\n"
    words = [text[start:end] for start, end in word_spans(text, make(long_word_documents()))]
    assert words == ["bal", "dom", ",", "kist"]


ENTITIES = [("PER", 1, 1), ("PER", 2, 4), ("LOC", 5, 6), ("LOC", 8, 8)]
SCHEMES = {  # of these entities of nine words
    "IOB2": "O B-PER B-PER I-PER I-PER B-LOC I-LOC O B-LOC",
    "IOB1": "O I-PER B-PER I-PER I-PER I-LOC I-LOC O I-LOC",
    "BIOES": "O S-PER B-PER I-PER E-PER B-LOC E-LOC O S-LOC",
    "BILOU": "O U-PER B-PER I-PER L-PER B-LOC L-LOC O U-LOC",
    "BMES": "O S-PER B-PER M-PER E-PER B-LOC E-LOC O S-LOC",
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_all_schemes_of_tags_are_the_same_entities(tmp_path, scheme):
    tags = SCHEMES[scheme].split()
    rows = [(list("abcdefghi"), tags)]
    json_path = tmp_path / "a.json"
    json_path.write_text(json.dumps([{"tokens": rows[0][0], "ner_tags": tags}]))
    for path in (write_conll(tmp_path / "a.conll", rows), json_path):
        train, _ = load(path, path)
        assert train.targets == [SCHEMES["IOB2"].split()]
        assert entities.entities_of(train.targets[0]) == ENTITIES


# A sentence of a file (words, tags), the same as running text, and its entities.
RUNNING_TEXT = {
    "English": (
        [("The", "O"), ("U.S.", "B-LOC"), ("won", "O"), ("vs.", "O"), ("Coca-Cola", "B-ORG")],
        "The U.S. won vs. Coca-Cola",
    ),
    "Chinese words": ([("王芳", "B-PER"), ("去", "O"), ("上海市", "B-LOC")], "王芳去上海市"),
    "Chinese characters": (
        [("王", "B-PER"), ("芳", "I-PER"), ("去", "O"), ("上", "B-LOC"), ("海", "I-LOC")],
        "王芳去上海",
    ),
    "Japanese": (
        [("私", "O"), ("は", "O"), ("さいたま市", "B-LOC"), ("へ", "O")],
        "私はさいたま市へ",
    ),
    "Thai": ([("ฉัน", "O"), ("อยู่", "O"), ("กรุงเทพ", "B-LOC"), ("นี้", "O")], "ฉันอยู่กรุงเทพนี้"),
    "Hindi": ([("राम", "B-PER"), ("दिल्ली", "B-LOC"), ("में", "O")], "राम दिल्ली में"),
    "Hindi with danda": ([("में", "O"), ("दिल्ली", "B-LOC"), ("।", "O")], "में दिल्ली।"),
    "Burmese": ([("ရန်ကုန်", "B-LOC"), ("မှာ", "O")], "ရန်ကုန်မှာ"),
    "Tamil": ([("சென்னை", "B-LOC"), (",", "O"), ("இந்தியா", "B-LOC")], "சென்னை, இந்தியா"),
    "Persian": ([("می‌خواهم", "O"), ("تهران", "B-LOC"), ("؟", "O")], "می‌خواهم تهران؟"),
    "decomposed accents": ([("Zu\u0308rich", "B-LOC"), (".", "O")], "Zu\u0308rich."),
    "quotes": ([("(", "O"), ("Rome", "B-LOC"), (")", "O"), ("»", "O")], "(Rome)»"),
    "Khmer": ([("ខ្ញុំ", "O"), ("នៅ", "O"), ("ភ្នំពេញ", "B-LOC")], "ខ្ញុំនៅភ្នំពេញ"),
}


@pytest.mark.parametrize("make", (wordpiece, byte_level_bpe, sentencepiece))
@pytest.mark.parametrize("language", RUNNING_TEXT)
def test_running_text_is_split_into_the_units_that_were_trained(make, language):
    """Their targets, decoded as predictions are, are the entities of the file."""
    pairs, text = RUNNING_TEXT[language]
    words, tags = map(list, zip(*pairs, strict=True))
    names = ["O", *(f"{letter}-{kind}" for letter in "BI" for kind in ("LOC", "ORG", "PER"))]
    tokenizer = make([*long_word_documents(), *[f"{text} {' '.join(words)}"] * 9])
    rows, first_pieces, _ = encode_words([words], tokenizer, 99)
    [target] = token_targets(rows, first_pieces, TaggedDataset([words], [tags], names))
    assert entities.word_tags(target, first_pieces[0], names) == tags

    spans = word_spans(text, tokenizer)
    trained = [word[a:b] for word in words for a, b in word_spans(word, tokenizer)]
    assert trained == [text[a:b] for a, b in spans]
    unit_tags = [names[number] for number in target if number != entities.NOT_SCORED]
    predicted = [text[spans[a][0] : spans[b][1]] for _, a, b in entities.entities_of(unit_tags)]
    assert predicted == ["".join(words[a : b + 1]) for _, a, b in entities.entities_of(tags)]


TAGS = st.sampled_from(["O", "B-A", "I-A", "B-B", "I-B"])
SENTENCES = st.lists(
    st.lists(st.tuples(TAGS, TAGS), min_size=1, max_size=9), min_size=1, max_size=4
)


@PROPERTY
@given(sentences=SENTENCES)
def test_entities_and_scores_are_seqevals(sentences):
    truth, predicted = ([[pair[i] for pair in s] for s in sentences] for i in (0, 1))
    for tags in (*truth, *predicted):
        assert entities.entities_of(tags) == get_entities(tags)
    expected = {"f1": f1_score, "precision": precision_score, "recall": recall_score}
    for name, value in entity_f1(truth, predicted).items():
        assert value == pytest.approx(expected[name](truth, predicted, zero_division=0))


def test_the_baseline_is_each_words_most_frequent_tag(tmp_path):
    write_conll(tmp_path / "a.conll", [(["x", "x", "x", "y"], ["B-A", "B-A", "O", "O"])] * 4)
    train, _ = load(tmp_path / "a.conll", tmp_path / "a.conll")
    assert most_frequent_tags(train, [["x", "y", "z"]]) == [["B-A", "O", "O"]]


# ---------------------------------------------------------------------------- the scripts


@pytest.fixture(scope="module")
def tagger(pretrained, tmp_path_factory):
    """(folder, metrics, test sentences) of a run of the whole script."""
    folder = tmp_path_factory.mktemp("tagger")
    train = write_conll(folder / "train.conll", tagged(150, 1))
    test = write_jsonl(folder / "test.jsonl", tagged(40, 2))
    flags = [
        "--model",
        str(pretrained),
        "--task",
        "tokens",
        "--train",
        str(train),
        "--test",
        str(test),
    ]
    metrics = finetune.main(
        [*flags, "--out", str(folder / "out"), *FAST, "--epochs", "6", "--lr", "3e-3"]
    )
    return folder / "out", metrics, tagged(40, 2)


def test_context_beats_the_most_frequent_tag(tagger):
    _, metrics, sentences = tagger
    assert list(metrics["test"]) == ["most_frequent", "random_weights", "pretrained"]
    assert metrics["test"]["pretrained"]["f1"] > metrics["test"]["most_frequent"]["f1"] + 0.1
    assert metrics["n_test"] == len(sentences)


def test_transformers_reads_the_folder_and_it_is_the_model_that_was_measured(tagger):
    out, metrics, sentences = tagger
    other = load_theirs(transformers.AutoModelForTokenClassification, out)
    assert other.config.id2label == dict(enumerate(metrics["names"]))
    config, weights, tokenizer, _ = model_folder.load_model(out)
    model = Tagger(config, len(metrics["names"])).eval()
    assert not model_folder.load_weights(model, weights, out)
    rows, places, _ = encode_words([words for words, _ in sentences], tokenizer, 32)
    predicted = []
    for row, first in zip(rows, places, strict=True):
        ids = torch.from_numpy(row[:, 0])
        with torch.no_grad():
            logits = model(ids, torch.tensor([0, len(ids)], dtype=torch.int32), len(ids))
            torch.testing.assert_close(other(ids[None]).logits[0], logits, rtol=1e-5, atol=1e-5)
        predicted.append(entities.word_tags(logits.argmax(1).numpy(), first, metrics["names"]))
    metrics_again = entity_f1([tags for _, tags in sentences], predicted)
    assert metrics_again["f1"] == pytest.approx(metrics["test"]["pretrained"]["f1"])


def test_predict_prints_entities_and_their_places(tagger, capsys):
    out, _, sentences = tagger
    texts = [" ".join(words) for words, _ in sentences[:20]]
    predict.main(["--model", str(out), "--json", "--batch-size", "7", "--dtype", "float32", *texts])
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["text"] for answer in answers] == texts and any(a["entities"] for a in answers)
    model, tokenizer, names = model_folder.open_model(out, torch.device("cpu"))
    for (words, _), text, answer in zip(sentences, texts, answers, strict=False):
        rows, (first,), _ = encode_words([words], tokenizer, 32)
        ids = torch.from_numpy(rows[0][:, 0])
        with torch.no_grad():
            best = model(ids, torch.tensor([0, len(ids)], dtype=torch.int32), len(ids)).argmax(1)
        tags = entities.word_tags(best.numpy(), first, names)
        expected = [(kind, " ".join(words[a : b + 1])) for kind, a, b in entities.entities_of(tags)]
        assert [(e["type"], e["text"]) for e in answer["entities"]] == expected
        assert all(text[e["start"] : e["end"]] == e["text"] for e in answer["entities"])
    every = sorted({word for words, _ in sentences for word in words})
    predict.main(["--model", str(out), "--dtype", "float32", *every, texts[0]])
    lines = capsys.readouterr().out.splitlines()
    assert any(line == f"-\t{word}" for word, line in zip(every, lines, strict=False))
    assert len(lines) == len(every) + 1 and lines[-1].endswith("\t" + texts[0])


@pytest.mark.parametrize("name", ("bert", "roberta"))
def test_a_tagger_of_another_family(tmp_path, name):
    other = their_folder(tmp_path, name, "ForTokenClassification", num_labels=3)
    model, tokenizer, names = model_folder.open_model(tmp_path, torch.device("cpu"))
    ids = tokenizer.encode(f"{WORDS[0]} {WORDS[1]}").ids
    flat = torch.tensor(ids), torch.tensor([0, len(ids)], dtype=torch.int32), len(ids)
    torch.testing.assert_close(model(*flat), other(flat[0][None]).logits[0], rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert len(predict_entities(model, tokenizer, ["O", "B-A", "I-A"], [WORDS[0]])[0]) == 1
    model_folder.save_model(
        tmp_path / "again", model, tokenizer, {"id2label": dict(enumerate(names))}
    )
    again = load_theirs(transformers.AutoModelForTokenClassification, tmp_path / "again")
    assert all(torch.equal(again.state_dict()[key], w) for key, w in other.state_dict().items())
    assert names == ["LABEL_0", "LABEL_1", "LABEL_2"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--text-column", "a"], "--task tokens takes no columns"),
        (["--pooling", "mean"], "no --pooling"),
        (["--lr", "0"], "no --lr 0"),
        (["--labels", "999"], "--labels 999: there are only 8 to train on"),
        (["--methods", "ngrams"], "--methods ngrams: choose from most_frequent,"),
    ],
)
def test_bad_flags(pretrained, tmp_path, capsys, flags, message):
    path = write_conll(tmp_path / "a.conll", tagged(10, 0))
    run = ["--model", str(pretrained), "--train", str(path), "--out", str(tmp_path / "out")]
    with pytest.raises((UserError, SystemExit)) as error:
        finetune.main([*run, "--task", "tokens", *flags])
    assert message in str(error.value) + capsys.readouterr().err


def test_token_labels_are_sampled_and_sentences_from_python_are_taken(pretrained, tmp_path):
    path = write_conll(tmp_path / "a.conll", tagged(40, 0))
    run = ["--model", str(pretrained), "--out", str(tmp_path / "out"), *FAST, "--epochs", "1"]
    files = ["--train", str(path), "--task", "tokens"]
    metrics = finetune.main([*run, *files, "--labels", "3", "--methods", "pretrained"])
    assert (metrics["n_train"], metrics["n_test"]) == (3, 8)
    data = load(path, None)
    metrics = finetune.main(run, data=data)
    assert list(metrics["test"]) == ["most_frequent", "random_weights", "pretrained"]
    with np.load(tmp_path / "out" / "predictions.npz") as arrays:
        for method, result in metrics["test"].items():
            assert len(arrays[method]) == len(arrays["targets"]) == sum(map(len, data[1].words))
            ends = np.cumsum([len(words) for words in data[1].words])[:-1]
            predicted = [list(tags) for tags in np.split(arrays[method], ends)]
            assert entity_f1(data[1].targets, predicted)["f1"] == result["f1"]
