"""What a training row is made of, and the four ways in which it is written.

An instruction row reads `### Instruction`, `### Context` (left out where there is none) and `### Answer`, each
with its text on the next line, a blank line between; a review is a prompt that names its subject, completed by
what a reader wrote; a document is its text.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import fsspec
import pyarrow as pa

from kit.data.text.language import detect_language
from kit.lake.manifest import Account
from kit.params import BuildDatasets

Row = dict[str, Any]
NUMBERS = {"rating": pa.float32(), "label": pa.int8()}
COLUMNS = "row_id doc_id kind item rating label prompt completion context language host source group"
ROW = pa.schema([(name, NUMBERS.get(name, pa.string())) for name in COLUMNS.split()])
"""`doc_id` is null for a row of a file, `source` (`FILE:LINE`) for one of a document, `label` without a rating."""
STYLES = {"Dolly": ("context", "response"), "Alpaca": ("input", "output")}
"""Keys of context and answer in the two usual kinds of instruction files; a line shows which it is."""
OTHER_LANGUAGE = "language not in train_languages"
LINE_BYTES = 16 << 20
SURE = 0.65
"""Least score from which a detected language counts, as in `RefineText.min_lang_score`."""
PASSAGE_WORDS = 20
"""Questions about one passage of so many words stay together; a context of "hello" joins nothing."""
DELIMITER = re.compile(r"^### (Instruction|Context|Answer)\s*$", re.MULTILINE)
NO_INPUT = re.compile(r"\W*no ?input\W*", re.IGNORECASE)
END_MARKER = re.compile(r"(\s*(###eos_token###|<\|endoftext\|>|<\|im_end\|>|</s>))+\s*$")
"""What other people's tokenizers left at the end of an answer; the trainer's own tokenizer ends rows itself."""
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029]")


class Made(NamedTuple):
    """What became of one record: rows, or the reason why there are none."""

    rows: list[Row]
    dropped: str = ""
    failed: str = ""


def note(account: Account, candidate: Made) -> None:
    """Count one record and what became of it: of several rows the others are created."""
    account.records_in += 1
    account.created += max(len(candidate.rows) - 1, 0)
    account.dropped.update(filter(None, [candidate.dropped]))
    account.failed.update(filter(None, [candidate.failed]))


def row_id(*parts: object) -> str:
    """Identity of a row or pair: a hash of what it was made from."""
    return hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=10).hexdigest()


def clean(text: str) -> str:
    """Without control characters and odd line ends, lone surrogates as `?`: valid UTF-8, and a line is a line."""
    return CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n")).encode("utf-8", "replace").decode()


def fold(text: str) -> str:
    """What two texts have in common that differ by case and white space only."""
    return " ".join(text.casefold().split())


def on_far_side(group: str, share: float, seed: int) -> bool:
    """Whether a group is held out, by a hash of its name: adding data moves no group to the other side."""
    return int(row_id(seed, group)[:8], 16) < int(share * 16**8)


def question_group(question: str) -> str:
    """Group of all rows and pairs that ask the same."""
    return f"question {row_id(fold(question))}"


def document_rows(doc: Row, p: BuildDatasets, reviews: bool) -> Made:
    """Rows of a document that was kept: its reviews, or its text as one row."""
    if p.train_languages and doc["lang"] not in p.train_languages:
        return Made([], OTHER_LANGUAGE)
    if reviews:
        rows = review_rows(doc, p)
        return Made(rows, "" if rows else "no review of item_types")
    text = clean(doc["text"])
    if not text.strip():
        return Made([], "nothing left of the text")
    keys = [f"near {doc['cluster_id']}"]
    if not doc["url"].startswith("file://"):  # a row of somebody's own file: not all of it is one site
        keys.append(f"host {doc['host']}")
    return Made([_row(doc, 0, "document", text, keys)])


def review_rows(doc: Row, p: BuildDatasets) -> list[Row]:
    """One row for each review whose subject is of a wanted type; a review of no named subject has no prompt."""
    rows = []
    for number, review in enumerate(doc["reviews"]):
        item, body = clean(review["item"] or ""), clean(review["body"] or "")
        wanted = not p.item_types or (item and review["item_type"] in p.item_types)
        if wanted and body.strip():
            prompt = p.prompt_template.format(item=item) if item else ""
            keys = [item.casefold() if item else f"near {doc['cluster_id']}"]
            row = _row(doc, number, "review", " " + body if prompt else body, keys)
            row |= {
                "rating": review["rating"],
                "label": sentiment_label(review["rating"], review.get("rating_max")),
            }
            row |= {"helpful": review["helpful"], "votes": review["votes"]}
            rows.append(row | {"item": item or None, "prompt": prompt, "question": prompt})
    return rows


def sentiment_label(rating: float | None, rating_max: float | None = None) -> int | None:
    """Sentiment: 1 from three stars of five on, else 0; other scales are stretched to five first.

    None without a rating or with one outside its scale. A review of 5 out of 10 (2.5 stars) is negative.
    """
    top = rating_max or 5.0
    if rating is None or not 0 <= rating <= top:
        return None
    return int(rating / top * 5 >= 3)


def _row(doc: Row, number: int, kind: str, completion: str, keys: list[str]) -> Row:
    row = {"row_id": row_id(doc["doc_id"], kind, number), "doc_id": doc["doc_id"], "kind": kind}
    row |= {"prompt": "", "completion": completion, "language": doc["lang"], "host": doc["host"]}
    return row | {"keys": keys, "question": "", "licence": "unknown", "label": None}


def json_lines(uri: str) -> Iterator[tuple[int, Row | str]]:
    """(number, object or reason why there is none) of each line that is not blank; holds at most 16 MB of a line."""
    with fsspec.open(uri, "rb", compression="infer") as f:
        number = 0
        while raw := f.readline(LINE_BYTES):
            number += 1
            whole = raw.endswith(b"\n") or len(raw) < LINE_BYTES
            while not whole and (more := f.readline(LINE_BYTES)) and not more.endswith(b"\n"):
                pass
            if not raw.strip():
                continue
            try:
                value = json.loads(raw) if whole else None
            except (ValueError, RecursionError):
                yield number, "not JSON"
            else:
                wrong = "not an object" if whole else "line over 16 MB"
                yield number, value if isinstance(value, dict) else wrong


def line_language(line: Row, text: str) -> str | None:
    """Language the line names (`lang`, `language`), or else the one detected; None when that is not sure."""
    named = line.get("lang") or line.get("language")
    if isinstance(named, str):
        return named[:2].casefold()
    language, score = detect_language(text)
    return language if score >= SURE else None


def instruction_row(line: Row | str, source: str, p: BuildDatasets) -> Made:
    """The row of one line of an instruction file; `source` (`FILE:LINE`) is where it came from."""
    keys = next((k for k in STYLES.values() if k[1] in line), None) if isinstance(line, dict) else None
    texts = [line.get("instruction"), *(line.get(k) or "" for k in keys)] if keys else [None]
    if not all(isinstance(text, str) for text in texts):
        wrong = line if isinstance(line, str) else "no texts 'instruction' and 'response' or 'output'"
        return Made([], failed=f"instruction file: {wrong}")
    asked, context, answer = (clean(text).strip() for text in texts)
    context, answer = "" if NO_INPUT.fullmatch(context) else context, END_MARKER.sub("", answer)
    if not asked or not answer:
        return Made([], "empty instruction or answer")
    if any(map(DELIMITER.search, (asked, context, answer))):
        return Made([], "text holds a section delimiter")
    language = line_language(line, f"{asked}\n{context}\n{answer}")
    if p.train_languages and language and language not in p.train_languages:
        return Made([], OTHER_LANGUAGE)
    row = {"row_id": row_id("instruction", asked, context, answer), "doc_id": None, "kind": "instruction"}
    row |= {"prompt": instruction_prompt(asked, context), "completion": answer, "context": context or None}
    row |= {"language": language, "host": None, "source": source, "label": None, "question": asked}
    keys = [question_group(asked)]
    if len(context.split()) >= PASSAGE_WORDS:
        keys.append(f"reading {row_id(fold(context))}")
    return Made([row | {"keys": keys, "licence": str(line.get("license") or "unknown")}])


def instruction_prompt(instruction: str, context: str = "") -> str:
    """All of an instruction row but its answer."""
    middle = f"### Context\n{context}\n\n" if context else ""
    return f"### Instruction\n{instruction}\n\n{middle}### Answer\n"


def _text(row: Row) -> Row:
    return {"text": row["prompt"] + row["completion"]}


def _instruct(row: Row) -> Row | None:
    asked, context, answer = row["question"], row.get("context") or "", row["completion"].strip()
    if not asked or any(map(DELIMITER.search, (asked, context, answer))):
        return None
    text = instruction_prompt(asked, context) + answer
    return {"text": text, "instruction": asked, "context": context, "answer": answer}


def _chat(row: Row) -> Row | None:
    asked = "\n\n".join(filter(None, (row["question"], row.get("context"))))
    said = (("user", asked), ("assistant", row["completion"].strip()))
    return {"messages": [{"role": role, "content": text} for role, text in said]} if asked else None


def _sentiment(row: Row) -> Row | None:
    return None if row["label"] is None else {"label": row["label"], "text": row["completion"].strip()}


FORMATS: dict[str, Callable[[Row], Row | None]] = {
    "text": _text,
    "instruction": _instruct,
    "chat": _chat,
    "sentiment": _sentiment,
}
"""A row as one line of JSON; None where it cannot be written so: no question asked, no rating given."""


def jsonl(record: Row) -> bytes:
    """One line of JSON Lines, valid UTF-8."""
    return (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "replace")
