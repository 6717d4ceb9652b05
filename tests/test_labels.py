"""LabeledDataset files, splits, budgets and batches keep every example, its label and its place."""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from files.disk import UserError
from files.tokenizer import SPECIAL_TOKENS
from labels import (
    HOLD_OUT,
    N_FOLDS,
    LabeledDataset,
    batches,
    cross_validation_splits,
    encode,
    load,
    subsample,
    validation_splits,
)

PROPERTY = settings(
    deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
WORD = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff\t\n\r"),
    min_size=1,
    max_size=8,
).filter(str.strip)
NAME = WORD.map(str.strip)


def write(path: Path, columns: list[str], rows: list[tuple]) -> Path:
    """A table in the format of the suffix."""
    if path.suffix == ".jsonl":
        lines = [
            json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False) for row in rows
        ]
    elif path.suffix == ".tsv":
        lines = ["\t".join(map(str, row)) for row in [columns, *rows]]
    else:
        quoted = [[f'"{str(cell).replace(chr(34), 2 * chr(34))}"' for cell in row] for row in rows]
        lines = [",".join(row) for row in [columns, *quoted]]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def examples(counts: list[int], seed: int = 0) -> LabeledDataset:
    """So many examples of each class, mixed; the text is the place in the file."""
    targets = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    names = [f"class {i}" for i in range(len(counts))]
    return LabeledDataset([str(i) for i in range(len(targets))], None, targets, names)


def places(part: LabeledDataset) -> list[int]:
    return [int(text) for text in part.texts]


# ---------------------------------------------------------------------------- files


@PROPERTY
@given(data=st.data(), suffix=st.sampled_from([".csv", ".tsv", ".jsonl"]), paired=st.booleans())
def test_texts_pairs_and_names_of_classes_are_kept(tmp_path, data, suffix, paired):
    names = data.draw(st.lists(NAME, min_size=2, max_size=5, unique=True))
    labels = data.draw(st.permutations(names * 2)) + data.draw(
        st.lists(st.sampled_from(names), max_size=5)
    )
    rows = [(data.draw(WORD), data.draw(WORD), label) for label in labels]
    path = write(
        tmp_path / f"a{suffix}", ["text", "text_pair" if paired else "other", "label"], rows
    )
    train, test = load(None, path, path, task="classify")
    for part in (train, test):
        assert part.texts == [row[0] for row in rows]
        assert part.pairs == ([row[1] for row in rows] if paired else None)
        assert [part.names[i] for i in part.targets] == labels
    assert sorted(train.names) == sorted(names)


def test_classes_are_in_numeric_order_and_others_by_name(tmp_path):
    names = ["10", "9", "-1", "2.5", "zwei Wörter", "été", "NaN", "Äpfel", "a, b"]
    path = write(
        tmp_path / "a.csv",
        ["text", "label"],
        [("t", name) for name in names] + [("t", f" {name}  ") for name in names],
    )
    assert load(None, path, path)[0].names == ["-1", "2.5", "9", "10", *sorted(names[4:])]


COLUMNS = {  # columns, what is asked for -> text, pair, label
    ("text", "label"): (None, None, None, "text", None, "label"),
    ("id", "Review", "Sentiment"): (None, None, None, "Review", None, "Sentiment"),
    ("label", "id", "a longer column"): (None, None, None, "a longer column", None, "label"),
    ("stars", "title", "review"): (None, None, None, "review", None, "stars"),
    ("idx", "sentence1", "sentence2", "label"): (
        None,
        None,
        None,
        "sentence1",
        "sentence2",
        "label",
    ),
    ("label", "Premise", "Hypothesis"): (None, None, None, "Premise", "Hypothesis", "label"),
    ("question", "answer", "score", "label"): (None, None, None, "question", "answer", "label"),
    ("text", "text_pair", "label", "why"): ("why", None, None, "why", None, "label"),
    ("text", "title", "class", "mood"): (None, None, "mood", "text", None, "mood"),
    ("text", "title", "label"): (None, "text", None, "title", "text", "label"),
    ("a", "b", "c"): ("c", "a", "b", "c", "a", "b"),
    ("text", "label", "y"): ("label", None, None, "label", None, "y"),
}


@pytest.mark.parametrize("columns", COLUMNS, ids=" ".join)
def test_columns_are_named_or_guessed_and_the_guess_is_printed(tmp_path, capsys, columns):
    *asked, text, pair, label = COLUMNS[columns]
    rows = [[f"{name} {i % 2}" for name in columns] for i in range(6)]
    path = write(tmp_path / "a.csv", columns, rows)
    train, _ = load(None, path, path, columns=tuple(asked))
    assert train.texts[0] == f"{text} 0" and train.names == [f"{label} 0", f"{label} 1"]
    assert train.pairs == (pair and [f"{pair} {i % 2}" for i in range(6)])
    printed = capsys.readouterr()
    assert f"text {text!r}" in printed.err and f"label {label!r}" in printed.out
    assert (f"with {pair!r}" in printed.err) == (pair is not None)


@pytest.mark.parametrize(
    ("labels", "task", "names"),
    [
        (["5", "1", "3", "10"], None, ["1", "3", "5", "10"]),
        ([1, 2, 3], None, ["1", "2", "3"]),
        ([True, False], None, ["False", "True"]),
        (["1", "2", "x"], None, ["1", "2", "x"]),
        (["0.5", "1.5", "2"], None, None),
        (list(range(77)), None, [str(i) for i in range(77)]),
        (list(range(21)), "classify", [str(i) for i in range(21)]),
        (["1", "2"], "regress", None),
        (["-1e3", " 2.25 "], None, None),
    ],
)
def test_integers_that_repeat_are_classes_and_numbers_are_targets(tmp_path, labels, task, names):
    rows = [("t", label) for label in labels * 2]
    for suffix in (".csv", ".jsonl"):
        path = write(tmp_path / f"a{suffix}", ["text", "label"], rows)
        train, test = load(None, path, path, task=task)
        assert train.names == test.names == names
        if names is None:
            assert train.targets.dtype == np.float32
            assert train.targets.tolist() == [float(label) for label in labels * 2]


CLASSES = "text,label\na,x\nb,y\nc,x\nd,y\ne,x\nf,y\n"
# train file, test file or None, keywords of load: how the message continues after the file
ERRORS = {
    "no label column": ("text,mood\na,x\n", None, {}, ": no label column .*--label-column"),
    "no such column": (
        CLASSES,
        None,
        {"columns": ("body", None, None)},
        ": --text-column body: .*text.*label",
    ),
    "only a label": ("label\na\nb\n", None, {}, ": no text column"),
    "one class": ("text,label\na,x\nb,x\n", None, {}, ": fewer than two classes: 'x'"),
    "an identifier as label": ("text,label\na,x\nb,y\n", None, {}, ": each label occurs once"),
    "unseen label": (CLASSES, "text,label\na,x\n\nb,new\n", {}, ":4: label 'new' .*x.*y"),
    "empty label": (CLASSES + "g,\n", None, {}, ":8: no label"),
    "blank label": (CLASSES + "g,  \n", None, {}, ":8: no label"),
    "empty text": (CLASSES + ",x\n", None, {}, ":8: no text in field 'text'"),
    "empty label in test": (CLASSES, "text,label\na,x\nb,\n", {}, ":3: no label"),
    "no label in test": (
        CLASSES,
        "text,mood\na,x\n",
        {},
        ": --label-column label: the columns are text, mood",
    ),
    "no number": (
        "text,label\na,1.5\nb,2.5\nc,x\n",
        None,
        {"task": "regress"},
        ":4: label 'x' is no number",
    ),
    "beyond float32": (
        "text,label\na,1.5\nb,1e39\n",
        None,
        {"task": "regress"},
        ":3: label '1e39'",
    ),
    "no number in test": (
        "text,label\na,1.5\nb,2.5\n",
        "text,label\na,x\n",
        {},
        ":2: label 'x' is no number",
    ),
    "no examples": ("text,label\n", None, {}, ": no examples"),
    "empty file": ("", None, {}, ":1: the first line must name the columns"),
    "one number": ("text,label\na,1.5\n", None, {}, "there is no example to hold out"),
}


@pytest.mark.parametrize("error", ERRORS)
def test_messages_name_file_and_line(tmp_path, error):
    content, test_content, more, words = ERRORS[error]
    train, test = tmp_path / "train.csv", tmp_path / "test.csv"
    train.write_text(content)
    if test_content:
        test.write_text(test_content)
        words = f"^{test}{words}"
    elif words[0] == ":":
        words = f"^{train}{words}"
    with pytest.raises(UserError, match=words) as caught:
        load(None, train, test if test_content else None, **more)
    assert "\n" not in str(caught.value)


def test_json_labels_have_to_be_labels_and_texts_texts(tmp_path):
    good = '{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n' * 2
    for bad in (
        '{"text": "a"}',
        '{"text": "a", "label": null}',
        '{"text": "a", "label": ["x", "y"]}',
        '{"text": "a", "label": []}',
        '{"text": "a", "label": NaN}',
        '{"text": "a", "label": [[1]]}',
        '{"label": "x"}',
    ):
        (tmp_path / "a.jsonl").write_text(good + bad)
        with pytest.raises(UserError, match=f"^{tmp_path / 'a.jsonl'}:5: no (text|label) in field"):
            load(None, tmp_path / "a.jsonl")


RECORD = st.dictionaries(
    st.sampled_from(["text", "text_pair", "label", "two\nlines"]),
    st.sampled_from(
        ["a", "b", "1", "", "two\nlines", 1, 2.5, 1e300, None, True, ["a"], {"a": 1}, float("nan")]
    ),
)
NOISE = st.lists(
    st.sampled_from([b"text,label", b"text\tlabel", b"a,x", b"b\ty", b'"', b",", b"\n", b"\xff"])
)


@settings(PROPERTY, max_examples=300)
@given(
    content=st.lists(RECORD.map(json.dumps), max_size=8).map("\n".join).map(str.encode)
    | NOISE.map(b"".join),
    suffix=st.sampled_from([".jsonl", ".csv", ".tsv"]),
)
def test_any_file_gives_examples_or_one_line_that_names_it(tmp_path, content, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    try:
        for part in load(None, path):
            assert len(part.texts) == len(part.targets) > 0 and np.isfinite(part.targets).all()
    except UserError as error:
        assert str(error).startswith((f"{path}:", "there is no example to hold out"))
        assert len(str(error).splitlines()) == 1


def test_other_files_are_no_labelled_examples(tmp_path):
    (tmp_path / "a.txt").write_text("a\nb\n")
    with pytest.raises(UserError, match=f"^{tmp_path / 'a.txt'}: labelled examples come as .jsonl"):
        load(None, tmp_path / "a.txt")


# ---------------------------------------------------------------------------- splits and budgets

TEXTS = st.lists(st.tuples(st.integers(0, 30), st.sampled_from("xyz")), min_size=8, max_size=60)


@PROPERTY
@given(rows=TEXTS)
def test_without_a_test_file_the_last_fifth_of_each_class_is_held_out_and_nothing_leaks(
    tmp_path, rows
):
    of_class = defaultdict(list)
    for text, label in rows:
        of_class[label].append(str(text))
    assume(len(of_class) > 1 and min(map(len, of_class.values())) > 2)
    held_out = {label: texts[-round(len(texts) / 5) :] for label, texts in of_class.items()}
    kept = {label: texts[: -round(len(texts) / 5)] for label, texts in of_class.items()}
    seen = {text for texts in kept.values() for text in texts}
    fresh = {
        label: [text for text in texts if text not in seen] for label, texts in held_out.items()
    }
    path = write(tmp_path / "a.csv", ["text", "label"], rows)
    if not any(fresh.values()):  # it says so, and continues
        fresh = held_out
    for part, expected in zip(load(None, path), (kept, fresh), strict=True):
        for i, name in enumerate(part.names):
            assert [part.texts[j] for j in np.flatnonzero(part.targets == i)] == expected[name]


COUNTS = st.lists(st.integers(2, 60), min_size=2, max_size=6)


@PROPERTY
@given(counts=COUNTS, data=st.data(), seed=st.integers(0, 5))
def test_a_budget_is_exact_stratified_and_in_the_order_of_the_file(counts, data, seed):
    whole = examples(counts)
    n = data.draw(st.integers(2 * len(counts), sum(counts)))
    drawn = subsample(whole, n, seed)
    assert places(drawn) == sorted(set(places(drawn))) and len(drawn) == n
    assert (
        drawn.targets.tolist() == whole.targets[places(drawn)].tolist()
        and drawn.names == whole.names
    )
    sizes, shares = (
        np.bincount(drawn.targets, minlength=len(counts)),
        n * np.array(counts) / sum(counts),
    )
    assert (sizes >= 2).all()
    if (shares >= 2).all():
        assert (np.abs(sizes - shares) < 1).all()
    assert places(subsample(whole, n, seed)) == places(drawn)


def test_seeds_draw_different_budgets_and_all_is_all():
    for whole in (
        examples([100, 100]),
        LabeledDataset([str(i) for i in range(99)], None, np.ones(99), None),
    ):
        draws = [places(subsample(whole, 20, seed)) for seed in range(4)]
        assert all(len(set(drawn)) == 20 and drawn == sorted(drawn) for drawn in draws)
        assert len(set(map(tuple, draws))) == 4
        assert (
            places(subsample(whole, None, 1))
            == places(subsample(whole, len(whole), 1))
            == list(range(len(whole)))
        )


def test_budgets_that_cannot_be_had_are_refused():
    with pytest.raises(UserError, match="--labels 10: there are only 9"):
        subsample(examples([5, 4]), 10, 0)


@pytest.mark.parametrize(
    ("counts", "n", "sizes"),
    [
        ([5, 4, 6], 5, [2, 1, 2]),
        ([5, 4, 6], 2, [1, 0, 1]),
        ([5, 4, 6], 1, [0, 0, 1]),
        ([3] * 20, 10, [1] * 10 + [0] * 10),
        ([1, 9], 2, [1, 1]),
    ],
)
def test_a_budget_below_two_per_class_is_of_the_frequent_classes(capsys, counts, n, sizes):
    drawn = subsample(examples(counts), n, 0)
    assert sorted(np.bincount(drawn.targets, minlength=len(counts))) == sorted(sizes)
    assert all(len(train_idx) and len(eval_idx) for train_idx, eval_idx in validation_splits(drawn))
    line = f"--labels {n}: fewer than two for each of the {len(counts)} classes\n"
    assert capsys.readouterr().out == (line if n < sum(min(2, c) for c in counts) else "")


def test_of_many_classes_with_one_example_none_is_held_out():
    assert validation_splits(examples([1] * 1001)) == []


@PROPERTY
@given(counts=COUNTS, n_folds=st.integers(2, 5), hold_out=st.floats(0.05, 0.5))
def test_folds_part_each_class_into_blocks(counts, n_folds, hold_out):
    whole = examples(counts)
    everything = set(range(len(whole)))
    splits = cross_validation_splits(whole, n_folds, hold_out)
    assert len(splits) == n_folds
    assert sorted(np.concatenate([held for _, held in splits])) == sorted(everything)
    for train, held in [*splits, *cross_validation_splits(whole, 1, hold_out)]:
        assert set(train.tolist()) == everything - set(held.tolist())
        assert len(train) + len(held) == len(whole)
        for name in range(len(counts)):
            inside = np.isin(np.flatnonzero(whole.targets == name), held)
            assert np.abs(np.diff(inside.astype(int), prepend=0, append=0)).sum() <= 2  # one run
    for name, count in enumerate(counts):
        sizes = [(whole.targets[held] == name).sum() for _, held in splits]
        assert max(sizes) - min(sizes) <= 1
        [(_, held)] = cross_validation_splits(whole, 1, hold_out)
        last = np.flatnonzero(whole.targets == name)[count - (whole.targets[held] == name).sum() :]
        assert set(last) <= set(held)
        assert len(last) == 1 or abs(len(last) - hold_out * count) <= 0.5 + 1e-9


@pytest.mark.parametrize("counts", [[2, 2], [2, 2, 2], [2, 2, 3], [3, 3], [9, 2]])
def test_no_fold_of_the_smallest_budgets_is_empty(counts):
    """finetune.py fits a model on each fold and measures it on the rest."""
    whole = examples(counts)
    for train, held in cross_validation_splits(whole, N_FOLDS, HOLD_OUT):
        assert len(held) > 0 and len(set(whole.targets[train].tolist())) == len(counts)


@pytest.mark.parametrize(
    ("labels", "task"),
    [
        ([i % 150 for i in range(400)], "classify"),  # intents
        ([2, 2, 4, 4, 4, 9], "classify"),  # stars, of which one occurs once
        ([i * i for i in range(400)], "regress"),  # a price
        ([i // 2 if i < 40 else i for i in range(400)], "regress"),  # a few repeat by chance
        ([0.5, 0.5, 1, 1], "regress"),
        ([f"{i % 3}.0" for i in range(30)], "classify"),
    ],
)
def test_the_guess_of_the_task_is_printed_with_the_flag_that_overrides_it(
    tmp_path, capsys, labels, task
):
    path = write(tmp_path / "a.csv", ["text", "label"], [("t", label) for label in labels])
    for flag in (None, task):
        train, _ = load(None, path, path, task=flag)
        assert (train.names is not None) == (task == "classify")
        printed = capsys.readouterr().out
        other = {"classify": "regress", "regress": "classify"}[task]
        is_printed = f"guessed: --task {task}; otherwise give --task {other}" in printed
        assert is_printed == (flag is None)


def test_whole_numbers_are_one_label_however_they_are_written(tmp_path):
    rows = [("a", "1"), ("b", "1.0"), ("c", "-2.00"), ("d", "-2"), ("e", "007"), ("f", "007")]
    path = write(tmp_path / "a.csv", ["text", "label"], rows)
    assert load(None, path, path)[0].names == ["-2", "1", "007"]


def test_a_few_gaps_in_a_column_of_numbers_do_not_make_it_classes(tmp_path):
    rows = [("t", i / 7) for i in range(20)] * 2
    path = write(tmp_path / "a.csv", ["text", "label"], [*rows, ("t", "N/A")])
    with pytest.raises(UserError, match=f"^{path}:42: label 'N/A' is no number, which --task reg"):
        load(None, path, path)


@pytest.mark.parametrize("labels", [["x"], [["x"]]], ids=["text", "list"])
def test_a_list_of_one_label_is_this_label(tmp_path, labels):
    path = tmp_path / "a.jsonl"
    rows = [{"text": "t", "label": label} for label in [*labels, ["y"], [3], [True]] * 2]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load(None, path, path)[0].names == ["3", "True", "x", "y"]


@pytest.mark.parametrize("n_rare", [1, 2, 3, 4])
def test_each_part_has_each_class_where_that_is_possible(tmp_path, capsys, n_rare):
    rows = [(f"common {i}", "xy"[i % 2]) for i in range(2000)]
    rows[500:500] = [(f"rare {i}", "z") for i in range(n_rare)]
    train, test = load(None, write(tmp_path / "a.csv", ["text", "label"], rows))
    is_single = n_rare == 1
    printed = capsys.readouterr().out
    assert ("one example only, for training: 'z'" in printed) == is_single
    assert ("1 of the classes have no test example" in printed) == is_single
    assert (2 in train.targets) and (2 in test.targets) == (not is_single)
    for part in (train, subsample(train, 1500, 0), subsample(train, 9, 0)):
        n_in_part = int((part.targets == 2).sum())
        assert n_in_part >= 1
        for n_folds in (1, N_FOLDS):
            splits = cross_validation_splits(part, n_folds, HOLD_OUT)
            assert all(2 in part.targets[train_idx] for train_idx, _ in splits)
            is_evaluated = any(2 in part.targets[eval_idx] for _, eval_idx in splits)
            assert is_evaluated == (n_in_part > 1)


def test_a_class_whose_test_examples_are_copies_is_named(tmp_path, capsys):
    rows = [(f"t{i}", "x") for i in range(20)] + [("same", "y")] * 5
    _, test = load(None, write(tmp_path / "a.csv", ["text", "label"], rows))
    assert test.texts == ["t16", "t17", "t18", "t19"]
    assert "1 of the classes have no test example" in capsys.readouterr().out
    rows = [("same", "xy"[i % 2]) for i in range(10)]
    _, test = load(None, write(tmp_path / "a.csv", ["text", "label"], rows))
    assert test.texts == ["same", "same"]
    assert "every held-out text is in the rest too" in capsys.readouterr().out


# ---------------------------------------------------------------------------- tokens and batches


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Of words "0" to "99", each one token."""
    words = [*SPECIAL_TOKENS.values(), *map(str, range(100))]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


WORDS = st.lists(st.integers(0, 99), max_size=60)


def joined(words: list[int]) -> str:
    return " ".join(map(str, words))


def head_and_tail(tokens: list[int], n: int) -> list[int]:
    return tokens if len(tokens) <= n else tokens[: n - n // 2] + tokens[len(tokens) - n // 2 :]


@PROPERTY
@given(texts=st.lists(WORDS, min_size=1, max_size=4), max_len=st.integers(8, 40))
def test_a_long_text_keeps_its_head_and_its_tail(tokenizer, texts, max_len):
    whole = LabeledDataset([joined(words) for words in texts], None, np.zeros(len(texts)), None)
    rows, n_cut = encode(whole, tokenizer, max_len)
    cls, sep = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    assert n_cut == sum(len(words) > max_len - 2 for words in texts)
    for words, row in zip(texts, rows, strict=True):
        assert len(row) == min(len(words) + 2, max_len)
        assert row[:, 0].tolist() == [cls, *head_and_tail([w + 5 for w in words], max_len - 2), sep]
        assert not row[:, 1].any()


@PROPERTY
@given(pairs=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4), max_len=st.integers(8, 40))
def test_of_a_pair_the_longer_text_is_cut_first(tokenizer, pairs, max_len):
    first, second = ([joined(words) for words in side] for side in zip(*pairs, strict=True))
    rows, n_cut = encode(
        LabeledDataset(first, second, np.zeros(len(pairs)), None), tokenizer, max_len
    )
    cls, sep = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    assert n_cut == sum(len(a) + len(b) + 3 > max_len for a, b in pairs)
    for (a, b), row in zip(pairs, rows, strict=True):
        assert len(row) == min(len(a) + len(b) + 3, max_len)
        cut = row[:, 0].tolist().index(sep)
        assert row[:, 1].tolist() == [int(i > cut) for i in range(len(row))]
        kept = (cut - 1, len(row) - cut - 2)
        for words, mine, other in ((a, *kept), (b, *kept[::-1])):
            assert mine == len(words) or mine >= other - 1  # cut only down to the other's length
        parts = [
            head_and_tail([w + 5 for w in words], n) for words, n in zip((a, b), kept, strict=True)
        ]
        assert row[:, 0].tolist() == [cls, *parts[0], sep, *parts[1], sep]


@PROPERTY
@given(
    lengths=st.lists(st.integers(2, 90), min_size=1, max_size=20),
    size=st.integers(1, 8),
    seed=st.integers(0, 9),
)
def test_batches_hold_every_sequence_once_and_fillers_at_the_end(lengths, size, seed):
    rng = np.random.default_rng(seed)
    rows = [rng.integers(1, 100, (n, 2)) for n in lengths]
    order = rng.permutation(len(rows))
    found = list(batches(rows, order, size))
    assert np.concatenate([which for which, *_ in found]).tolist() == order.tolist()
    assert [len(which) for which, *_ in found[:-1]] == [size] * (len(found) - 1)
    for which, (ids, cu_seqlens, longest, types) in found:
        assert cu_seqlens[0] == 0 and cu_seqlens[-1] == len(ids)
        n_tokens = sum(lengths[i] for i in which)
        assert len(ids) - n_tokens <= n_tokens / 32 and not ids[n_tokens:].any()
        assert len(ids) // (len(ids) & -len(ids)) <= 64  # few significant bits, so few lengths
        assert longest == cu_seqlens.diff().max() == max(lengths[i] for i in which)
        assert len(cu_seqlens) == len(which) + 1 - -(len(ids) - n_tokens) // longest
        for i, a, b in zip(which, cu_seqlens[:-1], cu_seqlens[1:], strict=False):
            assert torch.stack((ids[a:b], types[a:b]), 1).tolist() == rows[i].tolist()
