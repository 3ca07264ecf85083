"""Files of rows: split as the csv module and Spark split them, every row a document or a named loss."""

import csv
import gzip
import io
import json
import random
from pathlib import Path

import pytest

from kit.data.extract import reviews
from kit.data.extract.extract import extract_rows, extract_text
from kit.data.read import rows
from kit.data.read.archive import Damage, list_archives
from kit.data.refine.refine import refine_documents
from kit.data.select.index import Index, explore_index
from kit.data.trace import trace
from kit.errors import ArchiveError, RecordError
from kit.lake.store import Lake
from kit.params import ExploreIndex, ExtractText, RefineText, for_stage

NASTY = (
    b"\xef\xbb\xbfReview Text,Stars,note\r\n"
    b"plain,5,\r\n"
    b'"with, comma",4,x\n'
    b'"two\nlines, one with\r\n\r\na gap",3,x\r\n'
    b'"a ""word"" and an end""",2,x\r\n'
    b'""" at the start",2,x\n'
    b'"""",1,x\n'
    b'"",1,x\n'
    b'5" nails, not 6",2\n'
    b'"closed"early,3,x\n'
    b" spaced ,1,x\n"
    b"\r\n\n"
    b"old Mac,1,x\rother old Mac,2,x\n"
    b"few\n"
    b"na\xc3\xafve \xe2\x80\xa8 caf\xc3\xa9,5,x\n"
    b"fields to spare,5,x,,\n"
    b'last,"5"'
)
"""Every row of it is whole; the last has no line end."""


def spans(data: bytes, told: rows.Layout, size: int) -> list[tuple[int, bytes, str | None]]:
    return list(rows.cut_rows((data[i : i + size] for i in range(0, len(data), size)), told))


def documents(folder: Path, name: str, **values) -> tuple[list[dict], dict[str, str]]:
    """Documents of a file in `folder`, and the reason of each row that became none, by its bytes."""
    index = Index(ExploreIndex(archive_paths=[str(folder / name)], max_pages=0))
    table, failures = extract_rows(index.base, index.select().to_pylist(), ExtractText(**values))
    data = (folder / name).read_bytes()
    assert table.num_rows + len(failures) == index.rows
    starts = {f["warc_record_offset"]: f["reason"] for f in failures}
    return table.to_pylist(), {data[at:].splitlines()[0].decode(): why for at, why in starts.items()}


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
def test_rows_are_those_of_the_csv_module(size: int) -> None:
    told = rows.Layout("csv")
    found = spans(NASTY, told, size)
    wanted = [r for r in csv.reader(io.StringIO(NASTY.decode("utf-8-sig"), newline="")) if r]
    assert [next(csv.reader(io.StringIO(d.decode(), newline=""))) for _, d, _ in found] == wanted
    assert len(wanted) == 17
    for at, data, reason in found:
        assert NASTY[at : at + len(data)] == data and reason is None


def test_random_tables_split_as_the_csv_module_splits_them() -> None:
    random.seed(4)
    for _ in range(300):
        table = [
            ["".join(random.choices('a,"\n\r ;', k=random.randrange(6))) for _ in "abc"] for _ in range(9)
        ]
        out = io.StringIO(newline="")
        csv.writer(out, lineterminator=random.choice(["\n", "\r\n"])).writerows(table)
        found = spans(out.getvalue().encode(), rows.Layout("csv"), random.randrange(1, 20))
        # not the table itself: the writer leaves a lone \r unquoted, and the reader ends the row there
        wanted = [r for r in csv.reader(io.StringIO(out.getvalue(), newline="")) if r]
        assert [next(csv.reader(io.StringIO(d.decode(), newline=""))) for _, d, _ in found] == wanted


@pytest.mark.parametrize("size", [100, 1 << 20])
def test_a_quote_that_is_not_closed_costs_its_own_line(size: int) -> None:
    data = b'a,1\n"never closed,2\nb,3\n"also ""not"", 4\n"c",5\n'
    found = spans(data, rows.Layout("csv"), size)
    assert [(d, r) for _, d, r in found if r] == [
        (b'"never closed,2', "unclosed quote"),
        (b'"also ""not"", 4', "unclosed quote"),
    ]
    assert [d for _, d, r in found if not r] == [b"a,1", b"b,3", b'"c",5']
    long = b'a,1\n"open\n' + b"b,3\n" * 3_000_000 + b'x,"'
    found = spans(long, rows.Layout("csv"), 1 << 20)
    assert [r for *_, r in found if r] == ["unclosed quote"] * 2
    assert len(found) == 3_000_003


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r", b""])
@pytest.mark.parametrize("kind", ["csv", "txt"])
def test_a_line_too_long_is_one_named_loss(kind: str, end: bytes) -> None:
    data = b"first" + (end or b"\n") + b"x" * (rows.MAX_ROW * 3) + end + b"last" * bool(end)
    found = spans(data, rows.Layout(kind), 1 << 20)
    assert [r for *_, r in found] == [None, "row too long", None][: 3 if end else 2]
    at, kept, _ = found[1]
    assert at == len(b"first" + (end or b"\n")) and len(kept) == rows.MAX_ROW
    assert found[-1][1] == (b"last" if end else kept)


def test_spark_reads_the_same_texts(tmp_path: Path) -> None:
    # Spark keeps to one kind of line end in a file, and in '"closed"early' keeps the quotes
    data = NASTY.replace(b'"closed"early,3,x\n', b"").replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    (tmp_path / "nasty.csv").write_bytes(data)
    found, lost = documents(tmp_path, "nasty.csv")
    assert spark_texts(tmp_path / "nasty.csv", "Review Text") == sorted([d["text"] for d in found])
    assert lost == {'"",1,x': "no text"}


def spark_texts(path: Path, column: str) -> list[str]:
    """What Spark's own reader finds in a column; stripped, as a document's text is, and without empty ones."""
    from kit.data.engine.spark import session

    how = {"multiLine": True, "escape": '"', "quote": '"', "header": True}
    table = session(ExtractText(cores=2)).read.csv(str(path), **how)
    texts = [r[0].strip() for r in table.select(column).collect() if r[0]]
    return sorted(t for t in texts if t)


def test_the_real_reviews_pass_through_the_chain(real_data: Path, tmp_path: Path) -> None:
    path = real_data / "reviews.csv"
    lake = Lake(str(tmp_path / "lake"))
    given = {"archive_paths": [str(path)], "quality_rules": [], "keep_languages": ["en"], "cores": 2}
    for cls, stage in (
        (ExploreIndex, explore_index),
        (ExtractText, extract_text),
        (RefineText, refine_documents),
    ):
        stage(for_stage(cls, {"run": "mine", "lake": lake.uri, **given}), lake)
    with path.open(newline="", encoding="utf-8-sig") as f:
        wanted = list(csv.DictReader(f))
    index, extracted, refined = (
        lake.need("mine", s) for s in ("10_explore_index", "20_extract_text", "30_refine_text")
    )
    assert index.counts.records_in == index.counts.records_out == len(wanted) == 4867
    docs = lake.table(extracted).to_pylist()
    assert extracted.counts.records_out + sum(extracted.counts.dropped.values()) == 4867
    assert not extracted.counts.failed
    assert [reviews._plain(r["text"]) for r in wanted if r["text"].strip()] == [d["text"] for d in docs]
    assert [float(r["rating"]) for r in wanted if r["text"].strip()] == pytest.approx(
        [d["reviews"][0]["rating"] for d in docs]
    )
    assert {d["host"] for d in docs} == {r["source"] for r in wanted}
    assert refined.counts.records_in == len(docs)
    assert spark_texts(path, "text") == sorted(r["text"].strip() for r in wanted if r["text"].strip())
    told = trace(lake, docs[100]["doc_id"], ["mine"])
    assert "reviews.csv, offset" in told and "digest the same" in told


def reviews_csv(folder: Path, text: str, name: str = "mine.csv") -> Path:
    (folder / name).write_text(text, encoding="utf-8", newline="")
    return folder / name


def test_columns_are_found_by_their_usual_names_or_named(tmp_path: Path) -> None:
    told = rows.Layout(
        "csv",
        ";",
        ("reviewtext", "starrating", "producttitle", "reviewheadline", "helpfulvotes", "totalvotes", "site"),
    )
    found = reviews.document("So good!;4;A kettle;Hot;3;7;shop.example", told)
    (review,) = found["reviews"]
    assert (found["title"], found["text"], found["host"]) == ("Hot", "So good!", "shop.example")
    assert (review["item"], review["rating"], review["rating_max"]) == ("A kettle", 4.0, 5.0)
    assert (review["body"], review["helpful"], review["votes"]) == ("So good!", 3, 7)
    told = rows.Layout("csv", ",", ("a", "b"))
    with pytest.raises(RecordError, match="no column 'text'"):
        reviews.document("one,2", told)
    with pytest.raises(RecordError, match="no column 'C'"):
        reviews.document("one,2", told, "C")
    found = reviews.document("one,2", told, "A", "B")
    assert (found["text"], found["reviews"][0]["rating"], "host" in found) == ("one", 2.0, False)
    with pytest.raises(RecordError, match="more fields"):
        reviews.document("one,2,3", told, "A")


@pytest.mark.parametrize(
    ("value", "rating", "best"),
    [("4", 4, 5), ("4.5", 4.5, 5), ("4,5", 4.5, 5), ("7/10", 7, 10), ("positive", 5, 5), ("neg", 1, 5),
     ("8", 8, 8), ("good", None, None), ("", None, None), ("nan", None, None), ("-1", None, None)],
)  # fmt: skip
def test_ratings_are_read_as_people_write_them(value: str, rating: float | None, best: float | None) -> None:
    found = reviews.document(json.dumps({"text": "x", "stars": value}), rows.Layout("jsonl"))["reviews"]
    assert [(r["rating"], r["rating_max"]) for r in found] == ([(rating, best)] if rating else [])


def test_the_scale_of_ratings_is_seen_in_the_file(tmp_path: Path) -> None:
    for best, scale in ((4, 5.0), (9, 10.0), (71, 100.0), (1000, 1000.0)):
        path = reviews_csv(tmp_path, f"text|score\nfine, really|3\nmore|{best}\n")
        assert rows.layout(str(path)) == rows.Layout("csv", "|", ("text", "score"), scale)
    assert documents(tmp_path, "mine.csv")[0][0]["reviews"][0]["rating_max"] == 1000.0
    path = reviews_csv(tmp_path, "text\tscore\tx,y,z\na\t1\t8\n", "mine.tsv")
    assert rows.layout(str(path), "x,y,z").rating_max == 10.0


def test_mark_up_in_reviews_becomes_text() -> None:
    lines = [
        ("I couldn't.<br /><br />There <b>is</b> a < b.", "I couldn't.\nThere is a < b."),
        ("a < b and c > d, i <3 it &amp; you", "a < b and c > d, i <3 it & you"),
        ("<script>alert(1)</script>", "<script>alert(1)</script>"),
        ("<br />", ""),
    ]
    for text, wanted in lines:
        assert reviews.document(text, rows.Layout("txt"))["text"] == wanted


def test_lines_of_text_and_json_are_documents(tmp_path: Path) -> None:
    reviews_csv(tmp_path, '\ufeffone\n\n  \ntwo, "open\n', "a.txt")
    found, lost = documents(tmp_path, "a.txt")
    assert [d["text"] for d in found] == ["one", 'two, "open'] and lost == {"  ": "no text"}
    assert not found[0]["reviews"]
    deep = "[" * 100_000
    lines = [
        '{"Text": "half \\ud800 pair", "overall": 4, "asin": "B0", "helpful": [2, 3]}',
        "[1]",
        deep,
        "{",
        '{"text": null}',
    ]
    reviews_csv(tmp_path, "\n".join(lines), "a.jsonl")
    (doc,), lost = documents(tmp_path, "a.jsonl")
    review = doc["reviews"][0]
    assert (doc["text"], review["item"], review["rating"]) == ("half  pair", "B0", 4.0)
    assert (review["helpful"], review["votes"]) == (2, 3)
    assert [*lost.values()] == ["not a JSON object"] * 3 + ["no text"]


def test_a_packed_file_gives_the_same_documents_and_a_broken_one_what_it_can(tmp_path: Path) -> None:
    path = reviews_csv(
        tmp_path, "text,stars\n" + "".join(f'"review {i},\nof two lines",{i % 5}\n' for i in range(5000))
    )
    plain, _ = documents(tmp_path, path.name)
    packed = gzip.compress(path.read_bytes())
    (tmp_path / "mine.csv.gz").write_bytes(packed)
    index = Index(ExploreIndex(archive_paths=[str(tmp_path / "mine.csv.gz")]))
    table, failures = extract_rows(index.base, index.select().to_pylist(), ExtractText())
    assert not failures and table["text"].to_pylist() == [d["text"] for d in plain]
    assert table["reviews"].to_pylist() == [d["reviews"] for d in plain]
    (tmp_path / "mine.csv.gz").write_bytes(packed[: len(packed) // 2])
    index = Index(ExploreIndex(archive_paths=[str(tmp_path / "mine.csv.gz")]))
    assert {d.reason for d in index.damage} <= {"gzip member cut short", "unclosed quote"} and index.damage
    table, failures = extract_rows(index.base, index.select().to_pylist(), ExtractText())
    assert len(table) + len(failures) == index.rows > 1000
    assert table["text"].to_pylist()[:-1] == [d["text"] for d in plain][: len(table) - 1]


def test_a_file_without_rows_or_of_another_kind_is_told(tmp_path: Path) -> None:
    for name, text in (("a.csv", ""), ("b.csv", "text,rating\n"), ("c.txt", "\n\n")):
        (damage,) = rows.scan_rows(str(reviews_csv(tmp_path, text, name)), name)
        assert isinstance(damage, Damage) and damage.reason == "no row in file"
    (tmp_path / "d.tsv").write_text("text\tstars\nx\t1\n", encoding="utf-16")
    with pytest.raises(ArchiveError, match="UTF-16"):
        list(rows.scan_rows(str(tmp_path / "d.tsv"), "d.tsv"))


def test_a_row_that_changed_since_is_a_named_loss(tmp_path: Path) -> None:
    path = reviews_csv(tmp_path, "text,stars\none,1\ntwo,2\n")
    index = Index(ExploreIndex(archive_paths=[str(path)]))
    selected = index.select().to_pylist()
    path.write_text("text,stars\none,1\nTWO,2\n")
    table, failures = extract_rows(index.base, selected, ExtractText())
    assert table["text"].to_pylist() == ["one"] and [f["reason"] for f in failures] == [
        "digest is not the index's"
    ]
    path.unlink()
    assert [f["reason"] for f in extract_rows(index.base, selected, ExtractText())[1]] == [
        "archive file missing"
    ] * 2


def test_a_folder_of_archives_is_not_searched_for_rows(tmp_path: Path) -> None:
    reviews_csv(tmp_path, "text\nx\n")
    reviews_csv(tmp_path, "notes", "a.xlsx")
    assert [Path(f).name for f in list_archives([str(tmp_path)])] == ["mine.csv"]
    (tmp_path / "x.warc").write_bytes(b"")
    assert [Path(f).name for f in list_archives([str(tmp_path)])] == ["x.warc"]


def test_two_files_of_rows_have_ids_and_sites_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    reviews_csv(tmp_path, "text,source\none,\ntwo,https://films.example/x\n", "a b.csv")
    reviews_csv(tmp_path / "sub", "text\none\n", "a b.csv")
    index = Index(ExploreIndex(archive_paths=[str(tmp_path)]))
    docs = extract_rows(index.base, index.select().to_pylist(), ExtractText())[0].to_pylist()
    assert len({d["doc_id"] for d in docs}) == len({d["url"] for d in docs}) == 3
    assert [(d["url"], d["host"]) for d in docs] == [
        ("file://a%20b.csv/12", "a%20b.csv"),
        ("file://a%20b.csv/17", "films.example"),
        ("file://sub%2fa%20b.csv/5", "sub%2fa%20b.csv"),
    ]
