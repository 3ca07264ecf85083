"""Augmentation: what may change and what may not, the same choices everywhere, and a way back to the source."""

import random
import re
import shutil

import pyarrow as pa
import pytest

from kit.data.datasets import augment as eda
from kit.data.trace import trace
from kit.errors import ParamError
from kit.lake.manifest import Counts
from kit.lake.store import Lake
from kit.params import AugmentText, BuildDatasets

TEXTS = ("row_id", "doc_id", "kind", "item", "prompt", "completion", "language", "host", "source", "group")
ROW = pa.schema([*((name, pa.string()) for name in TEXTS), ("rating", pa.float32()), ("label", pa.int8())])
TEXT = (
    " The actor does not begin the movie well; write to <EMAIL> or see https://example.org/funny-movie today.\n"
    "### Answer: a funny movie\nI found The Funny Movie boring, it's a terrible story, and it doesn't end in silence!"
)


def row(number: int, text: str = TEXT, **values) -> dict:
    blank = dict.fromkeys(ROW.names)
    return blank | {"row_id": f"{number:020x}", "item": "The Funny Movie", "prompt": "The review of movie is",
                    "completion": text, "language": "en", "group": f"g{number}", "rating": 2.0} | values  # fmt: skip


def lake_of(folder, rows: list[dict]) -> Lake:
    """A lake with a stage 50 of these rows, and one held out."""
    lake = Lake(str(folder / "lake"))
    (folder / "rows.jsonl").write_text("{}\n")
    with lake.stage(BuildDatasets(run="r")) as out:
        out.read_outside(str(folder / "rows.jsonl"))
        out.table("train", pa.Table.from_pylist(rows, schema=ROW))
        out.table("heldout", pa.Table.from_pylist([row(999)], schema=ROW))
        out.commit(Counts(records_in=len(rows) + 1, records_out=len(rows) + 1))
    return lake


def made(operation: str, text: str, key: str = "k", language: str = "en", share: float = 0.3):
    return eda.augment(operation, text, key, "The Funny Movie", language, share, 0)


def test_synonyms_are_of_the_most_frequent_sense_and_were_met_in_it():
    found = eda.thesaurus()
    assert found["movie"] == ["film", "motion picture", "picture"]
    assert "awful" in found["terrible"] and "the" not in found
    assert len(found) > 5_000 and not any(w in found[w] for w in found)
    assert all(eda.GOOD.fullmatch(s) for others in found.values() for s in others)


@pytest.mark.parametrize("operation", eda.OPERATIONS)
def test_what_must_stay_stays(operation):
    kept = (
        "<EMAIL>",
        "https://example.org/funny-movie",
        "### Answer: a funny movie\n",
        "The Funny Movie",
        "doesn't",
    )
    for key in map(str, range(60)):
        text, changes, dropped = made(operation, TEXT, key)
        assert dropped is None and changes and text != TEXT
        assert all(text.count(x) == TEXT.count(x) for x in kept)
        assert len(re.findall(r"\bnot\b", text)) == 1
        marks = [re.sub(r"[\w\s'-]", "", x) for x in (text, TEXT)]
        assert operation == "synonym_insertion" or marks[0] == marks[1]


def test_each_operation_does_what_it_says():
    words = [m[0] for m in eda.WORD.finditer(TEXT)]
    for key in map(str, range(40)):
        text, _, _ = made("word_swap", TEXT, key)
        now = [m[0] for m in eda.WORD.finditer(text)]
        assert sorted(now) == sorted(words) and [w[0].isupper() for w in now] == [
            w[0].isupper() for w in words
        ]
        text, changes, _ = made("word_deletion", TEXT, key)
        assert len([*eda.WORD.finditer(text)]) == len(words) - len(changes)
        text, changes, _ = made("synonym_replacement", TEXT, key)
        assert all(new in eda.thesaurus()[old] for old, new in (c.split(" → ") for c in changes))
        text, changes, _ = made("synonym_insertion", TEXT, key)
        added = sum(len(c[2:].split(", of ")[0].split()) for c in changes)
        assert len(text.split()) == len(TEXT.split()) + added


def test_an_article_fits_its_new_noun():
    text = "it was an error and a terrible story for a person who had an instant to begin " * 3
    for key in map(str, range(80)):
        new, _, _ = made("synonym_replacement", text, key, share=0.9)
        assert not re.search(r"\ban [^aeiou\W]|\ba [aeiou]", new), new


def test_other_languages_get_swap_and_deletion_and_scripts_without_spaces_nothing():
    german = "Der Film beginnt sehr langsam und endet leider viel zu schnell in einer langen Nacht."
    assert made("word_swap", german, language="de")[0] and made("word_deletion", german, language="de")[0]
    assert made("synonym_replacement", german, language="de")[2] == "no synonyms for the language"
    assert (
        made("word_swap", "这部电影非常好看，演员也很出色。" * 9, language="zh")[2]
        == "fewer than 8 words to change"
    )
    assert made("synonym_insertion", "of the and to a in that it is " * 3)[2] == "nothing to change"


def test_hostile_texts_take_no_time():
    for text in ("<" * 200_000, "a@" * 100_000, "good " * 100_000, "### " * 50_000, "\u202e\x00" * 9, ""):
        for operation in eda.OPERATIONS:
            made(operation, text)


def test_rows_keep_what_is_not_completion_and_the_account_comes_out():
    rows = [row(1), row(2, "Short one."), row(3, TEXT, language="de", item=None)]
    p = AugmentText(copies=3)
    new, lost = eda.augment_rows(rows, p)
    assert len(rows) * 4 * 3 + len(rows) == len(new) + sum(lost.values())
    assert lost["synonym_replacement: no synonyms for the language"] == 3
    assert len({r["row_id"] for r in new}) == len(new)
    by_id = {r["row_id"]: r for r in rows}
    for copy in (r for r in new if r["source_row"]):
        changed = {k for k in by_id[copy["source_row"]] if copy[k] != by_id[copy["source_row"]][k]}
        assert changed == {"row_id", "completion"}
    assert eda.augment_rows(rows[::-1], p)[0] != new  # same rows, other order …
    assert sorted(eda.augment_rows(rows[::-1], p)[0], key=str) == sorted(
        new, key=str
    )  # … and the same choices
    assert eda.augment_rows(rows, AugmentText(copies=3, seed=1))[0] != new


def test_the_stage_on_spark_gives_the_same_bytes_on_other_cores_and_its_udfs_the_same_texts(tmp_path):
    rng = random.Random(0)
    rows = [
        row(i, " ".join(rng.choices(TEXT.split(), k=60)), source=f"{tmp_path}/rows.jsonl:{i}")
        for i in range(90)
    ]
    lake = lake_of(tmp_path, rows)
    one, two = (eda.augment_text(AugmentText(run="r", part_mb=0.004, cores=c), lake) for c in (2, 1))
    assert one.content_sha256 == two.content_sha256 and len(one.outputs) > 1
    assert (one.counts.records_in, one.counts.created) == (90, 360)
    table = lake.table(two, "train").to_pylist()
    assert [r["row_id"] for r in table if not r["source_row"]] == [r["row_id"] for r in rows]
    assert not any(r["row_id"].endswith("3e7") or r["source_row"] == row(999)["row_id"] for r in table)

    from kit.data.engine.spark import session

    spark = session(AugmentText(cores=1))
    frame = spark.createDataFrame([(r["row_id"], r["completion"], r["item"]) for r in rows], "id string, text string, item string")  # fmt: skip
    found = frame.select("id", eda.synonym_replacement_udf("text", "id", "item").alias("made")).collect()
    copies = {r["source_row"]: r for r in table if r["operation"] == "synonym_replacement"}
    assert {r.id: r.made.text for r in found if r.made.text} == {
        k: c["completion"] for k, c in copies.items()
    }

    copy = next(iter(copies.values()))
    told = trace(lake, copy["row_id"], ["r"])
    assert f"synonym_replacement of the row below\n          {'; '.join(copy['changes'])}" in told
    assert f"row       {copy['source_row']}" in told and "rows.jsonl, line" in told


def test_trace_leads_from_a_copy_to_the_bytes(data_lake, tmp_path):
    shutil.copytree(data_lake.root, tmp_path / "lake")
    lake = Lake(str(tmp_path / "lake"))
    manifest = eda.augment_text(AugmentText(cores=2), lake)
    copy = next(
        r for r in lake.table(manifest, "train").to_pylist() if r["operation"] == "word_swap" and r["doc_id"]
    )
    told = trace(lake, copy["row_id"], ["sample"])
    places = [
        told.index(x)
        for x in ("word_swap of", copy["changes"][0], copy["source_row"], copy["doc_id"], "bytes  ")
    ]
    assert places == sorted(places) and "digest the same" in told


def test_an_unknown_operation_is_named(tmp_path):
    with pytest.raises(ParamError, match="no back_translation; there are synonym_replacement"):
        eda.augment_text(AugmentText(operations=["back_translation"]), Lake(str(tmp_path)))
