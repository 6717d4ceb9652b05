"""Sequences of items as input of every script: tables, vocabulary, cuts, baselines, bad input."""

import csv
import gzip
import json

import numpy as np
import pytest
import torch

import finetune
import predict
import train
from analysis import baselines
from files import readers, sequences
from files.disk import UserError
from files.model_folder import open_model
from files.sequences import SEPARATOR, make_item_tokenizer, reads_items, split_items
from labels import encode, from_lists

SMALL = "--steps 4 --layers 1 --d-model 64 --max-len 16 --micro-batch-tokens 128 --dtype float32"
# With spaces, word-piece marks, both cases, other scripts, punctuation, control characters.
NAMES = [
    "a b",
    "##ing",
    "Film",
    "film",
    "фильм",
    "映画",
    "A",
    "!",
    "[X]",
    "x\ty\n",
    '"q", "r"',
    "É",
]


def join(items):
    return "".join(item + SEPARATOR for item in items)


def write_json(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def histories(n, seed, length=12):
    """Cycles through the names, so that the next item is known."""
    rng = np.random.default_rng(seed)
    starts = rng.integers(len(NAMES), size=n)
    return [[NAMES[(start + i) % len(NAMES)] for i in range(length)] for start in starts]


@pytest.fixture(scope="module")
def items_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("items")
    file = write_json(folder / "items.txt", [{"items": h} for h in histories(60, 0)])
    train.main(["--corpus", str(file), "--out", str(folder / "model"), *SMALL.split()])
    return folder / "model"


def read_texts(path, column=None):
    return [row[column or "text"] for _, row in readers.read_table(path, column=column)]


INTERACTIONS = [("u1", "b b", 881250950), ("u2", "x", 5), ("u1", "a", 881250949), ("u1", "B", 3)]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.inter", "a.txt", "a.jsonl", "a.csv.gz"])
@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_interactions_are_sorted_by_time_within_users_whatever_the_name(tmp_path, name, delimiter):
    header = ["user_id:token", "item_id:token", "timestamp:float"]
    lines = [delimiter.join(map(str, row)) for row in [header, *INTERACTIONS]]
    content = ("\n".join(lines) + "\n").encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    rows = [row for _, row in readers.read_table(path)]
    assert [row["text"] for row in rows] == [join(["B", "a", "b b"]), join(["x"])]
    assert rows[0]["times"] == (3, 881250949, 881250950)  # float32 would make the last two equal
    assert list(readers.read_documents(path)) == [row["text"] for row in rows]


def test_columns_of_interactions_are_named_by_a_flag_and_the_guess_is_printed(tmp_path, capsys):
    path = tmp_path / "a.csv"
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(
            [
                ("when", "User ID", "item", "other", "label"),
                *((9 - i, 7, i, "o", "x") for i in range(3)),
            ]
        )
    assert read_texts(path) == [join("012")]  # without a column of times, the order of the file
    guess = "the items of each user in the order of the file; guessed: --text-column User ID,item\n"
    assert guess in capsys.readouterr().err
    assert read_texts(path, "User ID,item,when") == [join("210")]
    assert read_texts(path, "when,other") == [join("o")] * 3
    rows = [row for _, row in readers.read_table(path, column="User ID,item")]
    assert rows[0]["label"] == "x"  # the same in all rows of the user
    with pytest.raises(UserError, match="--text-column User ID,nope: not USER,ITEM"):
        read_texts(path, "User ID,nope")


def test_texts_with_users_and_items_remain_texts(tmp_path):
    path = write_json(tmp_path / "a.jsonl", [{"text": "t", "items": ["a"], "user": 1, "item": 2}])
    assert read_texts(path) == ["t"]
    (tmp_path / "a.csv").write_text("user,item,review\n1,2,good\n")
    assert [row for _, row in readers.read_table(tmp_path / "a.csv")] == [
        {"user": "1", "item": "2", "review": "good"}
    ]


@pytest.mark.parametrize(
    ("rows", "line", "problem"),
    [
        ([{"items": ["a"]}, {"items": []}], 2, "no list of items in field 'items'"),
        ([{"items": [["a"], ["b"]]}], 1, "the item \"['a']\" is no text"),
        ([{"items": ["a"]}, {"ids": [1]}], 2, "both 'items' and 'ids' in one file"),
        ([{"items": ["a"], "ids": [1]}], 1, "both 'items' and 'ids' in one file"),
        ([{"ids": [1]}, {"ids": 5}], 2, "no list of items in field 'ids'"),
        (
            [{"ids": [3, -1]}],
            1,
            "the item '-1' is no text and no whole number from 0 to 2147483647",
        ),
        ([{"ids": [3, 10**30]}], 1, f"the item '{10**30}' is no text and"),
        ([{"ids": [3.0]}], 1, "the item '3.0' is no text and"),
        ([{"ids": [True]}], 1, "the item 'True' is no text and"),
        ([{"items": ["a", None]}], 1, "the item 'None' is no text and"),
        ([{"items": ["a", " "]}], 1, "the item ' ' is blank"),
        ([{"items": ["a"]}, {"items": ["x[UNK]"]}], 2, "named like the special token [UNK]"),
        ([{"items": ["[MASK]"]}], 1, "named like the special token [MASK]"),
        ([{"user": 1, "item": 2, "time": "noon"}], 1, "the time 'noon' is no number"),
        ([{"user": 1, "item": 2, "time": "nan"}], 1, "the time 'nan' is no number"),
        ([{"user": 1, "item": 2, "time": 1}, {"user": 1, "item": 2}], 2, "the time None is no"),
        ([{"user": "", "item": 2}], 1, "the item '' is blank"),
        ([{"user": 1, "item": -2}], 1, "the item '-2' is no text and"),
    ],
)
def test_a_broken_sequence_is_named_with_its_line(tmp_path, rows, line, problem):
    path = write_json(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError) as error:
        list(readers.read_documents(path))
    assert f"a.jsonl:{line}: " in str(error.value) and problem in str(error.value)
    with pytest.raises(UserError):
        train.main(["--corpus", str(path), "--out", str(tmp_path / "out"), *SMALL.split()])


def test_rare_items_become_unknown_and_are_counted(tmp_path, capsys):
    texts = [join(["a", "b", "a", "c"]), join(["b", "a", "d"])]
    tokenizer = make_item_tokenizer(iter(texts), 100, min_count=2)
    assert "2 items; 2 others, 28.6% of all tokens" in capsys.readouterr().out
    assert tokenizer.encode(texts[0]).tokens == ["[CLS]", "a", "b", "a", "[UNK]", "[SEP]"]
    assert make_item_tokenizer(iter(texts), 6, min_count=1).get_vocab_size() == 6
    with pytest.raises(UserError, match="no item occurs 9 times"):
        make_item_tokenizer(iter(texts), 100, min_count=9)


def test_the_vocabulary_is_bounded(monkeypatch):
    monkeypatch.setattr(sequences, "MOST_ITEMS", 50)
    with pytest.raises(UserError, match="more than 50 different items"):
        make_item_tokenizer((join([str(i)]) for i in range(99)), 100, min_count=1)


def test_every_item_is_one_token_and_decoding_gives_the_sequence():
    tokenizer = make_item_tokenizer([join(NAMES)], 100, min_count=1)
    ids = tokenizer.encode(join(NAMES), add_special_tokens=False).ids
    assert len(set(ids)) == len(NAMES) and min(ids) >= 5
    assert split_items(tokenizer.decode(ids)) == NAMES
    assert reads_items(tokenizer)


def test_long_sequences_keep_their_end():
    tokenizer = make_item_tokenizer([join("abcdef")], 100, min_count=1)
    rows, n_cut = encode(from_lists([join("abcdef"), join("ab")], ["x", "y"]), tokenizer, 5)
    decoded = [split_items(tokenizer.decode(row[1:-1, 0].tolist())) for row in rows]
    assert (decoded, n_cut) == ([list("def"), list("ab")], 1)


def test_a_long_document_is_cut_between_items(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LONGEST_DOCUMENT", 10)
    items = ["item", "b", "long one", "c", "d"]
    path = write_json(tmp_path / "a.jsonl", [{"items": items}])
    documents = list(readers.read_documents(path))
    assert max(map(len, documents)) <= 10 and "".join(documents) == join(items)
    assert all(document.endswith(SEPARATOR) for document in documents)


def test_baselines_count_items_whole_and_at_their_positions():
    texts = [join(["A", "a", "!"]), join(["a", "x y", "A"])]
    tokenizer = make_item_tokenizer(texts, 100, min_count=1)
    # A, a, !, x y; A a, a !, a x y, x y A; six items at positions
    assert baselines.count_ngrams(texts, tokenizer).shape == (2, 4 + 4 + 6)
    assert baselines.count_ngrams([*texts, join(["a"])], tokenizer).shape == (3, 4 + 4)


def test_the_folder_equals_transformers(items_model):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(items_model).eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(items_model)
    ours, tokenizer, _ = open_model(items_model, torch.device("cpu"))
    inputs = their_tokenizer(NAMES, is_split_into_words=True, return_tensors="pt")
    ids = tokenizer.encode(join(NAMES)).ids
    assert inputs["input_ids"][0].tolist() == ids
    with torch.no_grad():
        logits = ours.logits(torch.tensor(ids), torch.tensor([0, len(ids)], dtype=torch.int32), 16)
        torch.testing.assert_close(logits, theirs(**inputs).logits[0], rtol=1e-4, atol=1e-5)


def test_sequences_are_classified_and_their_masks_filled(items_model, tmp_path, capsys):
    rows = [{"items": h, "label": h[3] in NAMES[:6]} for h in histories(60, 1)]
    rows = [row | {"label": str(row["label"])} for row in rows]
    train_file = write_json(tmp_path / "train.jsonl", rows[:40])
    test_file = write_json(tmp_path / "test.jsonl", rows[40:])
    flags = f"--epochs 1 --methods ngrams,pretrained --out {tmp_path}/classifier --max-len 14"
    files = ["--train", str(train_file), "--test", str(test_file)]
    metrics = finetune.main(["--model", str(items_model), *files, *flags.split()])
    assert metrics["test"]["ngrams"]["accuracy"] > 0.8  # positions decide the class
    capsys.readouterr()
    predict.main(["--model", f"{tmp_path}/classifier", "--file", str(test_file), "--json"])
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["items"] for answer in answers] == [row["items"] for row in rows[40:]]

    masked = write_json(tmp_path / "m.jsonl", [{"items": ["film", "[MASK]"]}, {"items": ["[SEP]"]}])
    counts = predict.main(["--model", str(items_model), "--file", str(masked), "--top", "2"])
    output = capsys.readouterr()
    assert (counts["answered"], counts["broken"]) == (1, 1)
    assert "m.jsonl:2: the item '[SEP]' is named like the special token" in output.err


def test_a_model_of_text_refuses_sequences_and_the_reverse(pretrained, items_model, tmp_path):
    file = write_json(tmp_path / "a.jsonl", [{"items": h} for h in histories(60, 0)])
    text = tmp_path / "a.txt"
    text.write_text("a b c d e f g\n" * 200)
    flags = ["--out", str(tmp_path / "out"), "--steps", "1", "--micro-batch-tokens", "128"]
    for model, corpus in ((pretrained, [file]), (items_model, [text]), (None, [file, text])):
        with pytest.raises(UserError, match="text and sequences"):
            chosen = ["--model", str(model)] if model else []
            train.main(["--corpus", *map(str, corpus), *chosen, *flags])
