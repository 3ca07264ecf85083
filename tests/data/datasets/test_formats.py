"""Rows and their four formats, by texts written out by hand; labels; lines of instruction files of both styles."""

import gzip
import json

import pytest

from kit.data.datasets.formats import (
    FORMATS,
    clean,
    document_rows,
    instruction_row,
    json_lines,
    jsonl,
    question_group,
    sentiment_label,
)
from kit.params import BuildDatasets

P = BuildDatasets(train_languages=[])
REVIEW = {
    "item": "Fog",
    "item_type": "Movie",
    "rating": 8.0,
    "rating_max": 10.0,
    "body": "Grey.\nI liked it.",
    "helpful": None,
    "votes": None,
}
DOC = {"doc_id": "d", "url": "https://h/", "host": "h", "lang": "en", "cluster_id": "d", "text": "Hello.\r\nYou\u2028 there.", "reviews": [REVIEW]}  # fmt: skip
DOLLY = {"instruction": "Name the river. ", "context": "Paris lies on the Seine.", "response": " The Seine."}
ALPACA = {"instruction": "Name a river.", "input": "", "output": "The Oder."}


def written(row: dict) -> dict:
    return {name: write(row) for name, write in FORMATS.items()}


def test_an_instruction_with_context_is_three_sections_with_blank_lines_between() -> None:
    (row,) = instruction_row(DOLLY, "dolly.jsonl:1", P).rows
    text = (
        "### Instruction\nName the river.\n\n### Context\nParis lies on the Seine.\n\n### Answer\nThe Seine."
    )
    assert written(row) == {
        "text": {"text": text},
        "instruction": {
            "text": text,
            "instruction": "Name the river.",
            "context": "Paris lies on the Seine.",
            "answer": "The Seine.",
        },
        "chat": {
            "messages": [
                {"role": "user", "content": "Name the river.\n\nParis lies on the Seine."},
                {"role": "assistant", "content": "The Seine."},
            ]
        },
        "sentiment": None,
    }
    assert (row["prompt"] + row["completion"], row["completion"]) == (text, "The Seine.")
    assert (row["doc_id"], row["source"], row["context"]) == (None, "dolly.jsonl:1", DOLLY["context"])


@pytest.mark.parametrize("nothing", ["", "  \n", "noinput", "<noinput>", "`NoInput`", "No input.", None])
def test_without_context_there_is_no_such_section(nothing: str | None) -> None:
    (row,) = instruction_row(ALPACA | {"input": nothing}, "alpaca.jsonl:1", P).rows
    assert written(row)["instruction"] == {
        "text": "### Instruction\nName a river.\n\n### Answer\nThe Oder.",
        "instruction": "Name a river.",
        "context": "",
        "answer": "The Oder.",
    }
    assert written(row)["chat"]["messages"][0] == {"role": "user", "content": "Name a river."}
    assert row["context"] is None


def test_a_review_and_a_document_in_every_format() -> None:
    (row,) = document_rows(DOC, P, reviews=True).rows
    prompt, body = "The review of movie 'Fog' is", "Grey.\nI liked it."
    assert written(row) == {
        "text": {"text": f"{prompt} {body}"},
        "instruction": {
            "text": f"### Instruction\n{prompt}\n\n### Answer\n{body}",
            "instruction": prompt,
            "context": "",
            "answer": body,
        },
        "chat": {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": body}]},
        "sentiment": {"text": body, "label": 1},
    }
    (row,) = document_rows(DOC, P, reviews=False).rows
    nothing = {"instruction": None, "chat": None, "sentiment": None}
    assert written(row) == {"text": {"text": "Hello.\nYou there."}} | nothing


def test_a_review_of_nothing_named_has_no_prompt_and_is_taken_only_when_all_types_are() -> None:
    doc = DOC | {"reviews": [REVIEW | {"item": None, "item_type": None}]}
    assert document_rows(doc, P, reviews=True).dropped == "no review of item_types"
    (row,) = document_rows(doc, BuildDatasets(item_types=[]), reviews=True).rows
    assert written(row)["text"] == {"text": "Grey.\nI liked it."}
    assert written(row)["chat"] is None and written(row)["sentiment"]["label"] == 1
    assert row["keys"] == ["near d"]


@pytest.mark.parametrize(
    ("rating", "scale", "wanted"),
    [
        *((r, 5.0, int(r >= 3)) for r in (1.0, 2.0, 3.0, 4.0, 5.0)),
        *((r, 10.0, int(r >= 6)) for r in map(float, range(1, 11))),
        (59.0, 100.0, 0),
        (60.0, 100.0, 1),
        (3.0, 4.0, 1),
        (2.0, 4.0, 0),
        (3.0, None, 1),
        (2.0, None, 0),
        (2.5, 5.0, 0),
        (0.0, 5.0, 0),
        (None, 5.0, None),
        (6.0, 5.0, None),
        (-1.0, 5.0, None),
        (float("nan"), 5.0, None),
    ],
)
def test_three_stars_of_five_and_more_are_positive(rating, scale, wanted) -> None:
    assert sentiment_label(rating, scale) == wanted


@pytest.mark.parametrize(
    ("line", "dropped", "failed"),
    [
        ({"instruction": "x", "output": " "}, "empty instruction or answer", ""),
        ({"instruction": "", "response": "x"}, "empty instruction or answer", ""),
        ({"instruction": "x", "response": "a\n### Answer\nb"}, "text holds a section delimiter", ""),
        ({"instruction": "### Context", "response": "b"}, "text holds a section delimiter", ""),
        ({"instruction": "x"}, "", "no texts"),
        ({"instruction": 3, "output": "x"}, "", "no texts"),
        ({"instruction": "x", "output": None}, "empty instruction or answer", ""),
        ({"instruction": "x", "input": ["y"], "output": "z"}, "", "no texts"),
        ("not JSON", "", "not JSON"),
    ],
)
def test_a_line_that_makes_no_row_says_why(line, dropped: str, failed: str) -> None:
    made = instruction_row(line, "f:1", P)
    assert made.rows == [] and made.dropped == dropped and failed in made.failed
    assert bool(made.failed) == bool(failed)


def test_end_markers_of_other_tokenizers_go() -> None:
    for marker in ("###eos_token###", "</s>", "\n<|endoftext|> </s>\n"):
        (row,) = instruction_row(DOLLY | {"response": f"The </s> Seine.{marker}"}, "f:1", P).rows
        assert row["completion"] == "The </s> Seine."


def test_a_language_that_is_named_or_sure_decides() -> None:
    english = BuildDatasets(train_languages=["en"])
    chinese = {"instruction": "描述安第斯山脉的位置。", "output": "安第斯山脉位于南美洲，横跨七个国家。"}
    for line, kept in (
        (DOLLY, True),
        (chinese, False),
        (DOLLY | {"lang": "de"}, False),
        (chinese | {"language": "en-GB"}, True),
        ({"instruction": "2+2?", "output": "4"}, True),
    ):
        assert bool(instruction_row(line, "f:1", english).rows) == kept, line
        assert instruction_row(line, "f:1", P).rows


def test_the_row_is_the_same_wherever_its_file_lies() -> None:
    ids = {instruction_row(DOLLY, f, P).rows[0]["row_id"] for f in ("a:1", "b:7")}
    assert len(ids) == 1


def test_a_question_is_the_same_in_any_case_and_spacing() -> None:
    assert question_group("Why  is it?") == question_group(" why is\nIT?") != question_group("Why was it?")


def test_lines_of_a_file_are_numbered_and_every_fault_is_named(tmp_path) -> None:
    lines = [
        b'{"a": 1}',
        b"",
        b"{",
        b"[1]",
        b'"text"',
        b"\xff\xfe",
        b"[" * 100_000,
        b"x" * (17 << 20),
        b'{"b": 2}',
    ]
    for name, pack in (("x.jsonl", bytes), ("x.jsonl.gz", gzip.compress)):
        (tmp_path / name).write_bytes(pack(b"\r\n".join(lines)))
        found = list(json_lines(str(tmp_path / name)))
        assert found == [
            (1, {"a": 1}),
            (3, "not JSON"),
            (4, "not an object"),
            (5, "not an object"),
            (6, "not JSON"),
            (7, "not JSON"),
            (8, "line over 16 MB"),
            (9, {"b": 2}),
        ]


def test_hostile_text_is_one_valid_line() -> None:
    hostile = "a\ud800b\x00c\u2028d\x85e\r\nf\x1b[31m\u202eg\tß"
    (row,) = instruction_row(DOLLY | {"response": hostile, "license": "\udfff"}, "f:1", P).rows
    assert row["completion"] == clean(hostile) == "a?bcde\nf[31m\u202eg\tß"
    for write in FORMATS.values():
        if write(row):
            line = jsonl(write(row)).decode()
            assert len(line.splitlines()) == 1 and json.loads(line) == write(row)


def test_real_files_of_both_styles(real_data) -> None:
    for name, count in (("dolly_sample", 88), ("instructions_sample", 1113)):
        lines = list(json_lines(str(real_data / f"{name}.jsonl")))
        made = [instruction_row(line, f"{name}:{n}", P) for n, line in lines]
        assert len(made) == count and not any(m.failed for m in made)
        rows = [r for m in made for r in m.rows]
        assert len(rows) == count
        assert not any("eos_token" in r["completion"] for r in rows)
        with_context = sum("\n\n### Context\n" in r["prompt"] for r in rows)
        key = "context" if name == "dolly_sample" else "input"
        told = sum(
            bool(x[key].strip()) and "noinput" not in x[key].lower().replace(" ", "") for _, x in lines
        )
        assert with_context == told
