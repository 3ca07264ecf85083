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
from ftfy.badness import MOJIBAKE_CATEGORIES

from kit.data import pii, quality
from kit.data.extract import DOCUMENT
from kit.data.language import detect_language
from kit.data.spark import run_tasks
from kit.lake import Counts, Lake, Manifest, Output, write_table
from kit.params import ParamError, RefineText

CONTROL_CHARS = r"\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff\ud800-\udfff"
CONTROL = re.compile(f"[{CONTROL_CHARS}]")
LETTERS = "".join(MOJIBAKE_CATEGORIES[k] for k in ("lower_common", "upper_common"))
"""Greek and Cyrillic: side by side they are no sign of mojibake, next to any of `SIGNS` they may be."""
SIGNS = "".join(
    MOJIBAKE_CATEGORIES[k] for k in MOJIBAKE_CATEGORIES if k not in ("lower_common", "upper_common")
)
SUSPECT = (
    re.compile(rf"[{CONTROL_CHARS}\u206a-\u206f\ufff9-\ufffcÂÃŒœЂ]"),
    re.compile(rf"[{SIGNS}](?:[{SIGNS}{LETTERS}]|(?<=[{SIGNS}{LETTERS}].))"),
)
"""What a line in NFC must hold for ftfy to change it: something to remove, or what its heuristic needs at least
(`ftfy.badness`; searching for that itself is 30 times as slow). A test holds the two against each other."""
LINE = re.compile(r"[^\n]*\n|[^\n]+")
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


def repair(text: str) -> str:
    """Undo mojibake, normalise to NFC, drop control and direction characters, tidy white space."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\u2028", "\n").replace("\u2029", "\n")
    if _suspect(text):
        fixed = "".join(ftfy.fix_text(x, REPAIR) if _suspect(x) else x for x in LINE.findall(text))
        text = unicodedata.normalize("NFC", CONTROL.sub("", fixed))
    text = "\n".join([" ".join(line.split()) for line in text.split("\n")])
    if "\n\n\n" in text:
        text = re.sub(r"\n{3,}", "\n\n", text)
    return text.strip()


def _suspect(text: str) -> bool:
    """Whether there may be anything in it for ftfy, NFC or `CONTROL` to change."""
    return any(x.search(text) for x in SUSPECT) or not unicodedata.is_normalized("NFC", text)


def verdict(row: dict[str, Any], p: RefineText) -> tuple[list[str], str | None]:
    """Names of all rules a tagged document breaks, and the first of them: its `drop_reason`."""
    broken = []
    if row["lang_score"] < p.min_lang_score:
        broken.append("language: uncertain")
    elif p.keep_languages and row["lang"] not in p.keep_languages:
        broken.append("language: not kept")
    broken += quality.failing(row["tags"], row["lang"], p.quality_rules, dict(p))
    return broken, broken[0] if broken else None


def refine_row(row: dict[str, Any], p: RefineText) -> dict[str, Any]:
    """One document with clean text, tags and verdict added.

    Title, reviews and what is said about images are repaired and masked like the text; `pii` counts the text's.
    """
    return refine_rows([row], p)[0]


def refine_rows(rows: list[dict[str, Any]], p: RefineText) -> list[dict[str, Any]]:
    """`refine_row` for many.

    Step by step over all rows, so that the language model and the tables of one step stay in the processor's
    cache while it runs: a fifth faster than row by row.
    """
    texts = [repair(row["text"]) for row in rows]
    languages = [detect_language(text) for text in texts]
    tags = [quality.measure(text) for text in texts]
    return [_refined(*values, p) for values in zip(rows, texts, languages, tags)]


def _refined(
    row: dict[str, Any], text: str, language: tuple[str, float], tags: dict[str, float], p: RefineText
) -> dict[str, Any]:
    """A row with what was found out about its repaired text, masked and judged."""
    lang, score = language

    def clean(value: str | None) -> str:
        fixed = repair(value) if value else ""
        return pii.mask(fixed, lang)[0] if p.mask_pii and fixed else fixed

    masked, counts = pii.mask(text, lang)
    refined = row | {
        "repaired": text != row["text"],
        "lang": lang,
        "lang_score": score,
        "tags": tags,
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
    return pa.Table.from_pylist(refine_rows(table.to_pylist(), p), schema=REFINED)


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
    # quoted: DuckDB reads a bare number as a decimal, which as a double may be its neighbour
    cases = [f"WHEN lang_score < '{params['min_lang_score']}'::DOUBLE THEN 'language: uncertain'"]
    if params["keep_languages"]:
        kept = ", ".join("'" + x.replace("'", "''") + "'" for x in params["keep_languages"])
        cases.append(f"WHEN lang NOT IN ({kept}) THEN 'language: not kept'")
    for rule in (r for r in quality.RULES if r.rule_set in params["quality_rules"]):
        low, high = rule.bounds(params)
        limits = [f"tags.{rule.column} < '{low}'::DOUBLE"] if low is not None else []
        limits += [f"tags.{rule.column} > '{high}'::DOUBLE"] if high is not None else []
        scope = {"english": "lang = 'en'", "spaces": f"lang NOT IN {tuple(sorted(quality.UNSPACED))}"}
        where = f" AND {scope[rule.needs]}" if rule.needs else ""
        cases.append(f"WHEN ({' OR '.join(limits)}){where} THEN '{rule.name}'")
    with duckdb.connect() as con:
        con.register("tags", tags)
        rows = con.execute(
            f"SELECT CASE {' '.join(cases)} ELSE 'kept' END AS reason, count(*) FROM tags GROUP BY 1 ORDER BY 2 DESC, 1"
        ).fetchall()
    return dict(rows)
