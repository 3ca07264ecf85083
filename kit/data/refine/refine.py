"""Documents → the same documents with clean text, tags and a verdict; nothing is deleted.

`refine_batch` is a plain function from table to table. What moves on is `drop_reason IS NULL`; the values
behind every verdict are kept, so a threshold can be moved without touching a page again: in a notebook by
`Verdicts`, in a rerun of the stage by `refine_documents` itself. What a recipe does not ask for is not computed
and null: rule sets in neither `quality_rules` nor `tag_rules`, personal data not in `pii_types`, features.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from typing import Any

import ftfy
import pyarrow as pa
import pyarrow.compute as pc
from ftfy.badness import MOJIBAKE_CATEGORIES

from kit.data.engine.spark import run_tasks
from kit.data.extract.schema import DOCUMENT
from kit.data.refine import features, pii, quality, urls
from kit.data.text import rules
from kit.data.text.language import detect_language
from kit.errors import ParamError
from kit.lake.manifest import Account, Manifest
from kit.lake.store import Lake
from kit.params import RefineText, Refining, did_you_mean

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
# line by line, so that only those that are suspect go through ftfy
LINE = re.compile(r"[^\n]*\n|[^\n]+")
# what these would change is typography, not damage: quotes, ligatures and full-width letters are the author's
REPAIR = ftfy.TextFixerConfig(
    unescape_html=False, uncurl_quotes=False, fix_latin_ligatures=False, fix_character_width=False
)
# 64 bits: with 32 a value on its threshold would be judged one way here and another way by `Verdicts`
TAGS = pa.struct([(name, pa.float64()) for name in rules.COLUMNS])
PII = pa.struct([(kind, pa.int32()) for kind in pii.TYPES])
REFINED = pa.schema(
    [
        *DOCUMENT,
        ("repaired", pa.bool_()),
        ("lang", pa.string()),
        ("lang_score", pa.float64()),
        ("tags", TAGS),
        ("pii", PII),
        ("features", features.SCHEMA),
        ("failed_rules", pa.list_(pa.string())),
        ("drop_reason", pa.string()),
    ]
)


def repair(text: str) -> str:
    """Undo mojibake, normalise to NFC, drop control and direction characters, tidy white space."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\u2028", "\n").replace("\u2029", "\n")
    if _suspect(text):
        fixed = "".join(
            ftfy.fix_text(line, REPAIR) if _suspect(line) else line for line in LINE.findall(text)
        )
        text = unicodedata.normalize("NFC", CONTROL.sub("", fixed))
    text = "\n".join([" ".join(line.split()) for line in text.split("\n")])
    if "\n\n\n" in text:
        text = re.sub(r"\n{3,}", "\n\n", text)
    return text.strip()


def _suspect(text: str) -> bool:
    """Whether there may be anything in it for ftfy, NFC or `CONTROL` to change."""
    return any(pattern.search(text) for pattern in SUSPECT) or not unicodedata.is_normalized("NFC", text)


def measured_rule_sets(p: Refining) -> set[str]:
    """The rule sets whose values are kept."""
    return {*p.quality_rules, *p.tag_rules}


def verdict(row: dict[str, Any], p: Refining) -> tuple[list[str], str | None]:
    """Names of all rules a tagged document breaks, and the first of them: its `drop_reason`.

    In this order: the URL, the language, then the other rule sets in the order of `RULES`.
    """
    broken = quality.failing(row["tags"], row["lang"], [r for r in p.quality_rules if r == "url"], dict(p))
    if row["lang_score"] < p.min_lang_score:
        broken.append("language: uncertain")
    elif p.keep_languages and row["lang"] not in p.keep_languages:
        broken.append("language: not kept")
    others = [r for r in p.quality_rules if r != "url"]
    broken += quality.failing(row["tags"], row["lang"], others, dict(p))
    return broken, broken[0] if broken else None


def refine_rows(rows: list[dict[str, Any]], p: Refining) -> list[dict[str, Any]]:
    """Documents with clean text, tags and verdict added.

    Title, reviews and what is said about images are repaired and masked like the text; `pii` counts the text's. Step by
    step over all rows, so that the language model and the tables of one step stay in the processor's
    cache while it runs: a fifth faster than row by row.
    """
    texts = [repair(row["text"]) for row in rows]
    languages = [detect_language(text) for text in texts]
    sets = measured_rule_sets(p)
    # every column is there in every row: null says that a rule was not measured
    empty = dict.fromkeys(rules.COLUMNS)
    moving = [quality.rule_values(text, sets, p.c4_lines) for text in texts]
    tags = [empty | values for _, values in moving]
    if "url" in sets:
        blocked = urls.blocklist(p.blocked_urls)
        tags = [t | urls.measure_url(row["url"], blocked) for t, row in zip(tags, rows)]
    moving = [text for text, _ in moving]
    return [_refined(*values, p) for values in zip(rows, texts, moving, languages, tags)]


def _refined(
    row: dict[str, Any],
    repaired: str,
    text: str,
    language: tuple[str, float],
    tags: dict[str, float | None],
    p: Refining,
) -> dict[str, Any]:
    """A row with what was found out about its repaired text, masked and judged; `text` is what moves on."""
    lang, score = language
    types = tuple(p.pii_types)

    def clean(value: str | None) -> str:
        fixed = repair(value) if value else ""
        return pii.mask(fixed, lang, types)[0] if p.mask_pii and fixed else fixed

    # counted even where it is not masked: a user sees what a mask would have taken
    masked, counts = pii.mask(text, lang, types) if types else (text, {})
    text = masked if p.mask_pii else text
    refined = row | {
        "repaired": repaired != row["text"],
        "lang": lang,
        "lang_score": score,
        "tags": tags,
        "pii": {kind: counts.get(kind) if kind in types else None for kind in pii.TYPES},
        "features": features.text_features(text, lang, p.features, p.entity_models) if p.features else None,
        "text": text,
        "title": clean(row["title"]),
        "reviews": [r | {"title": clean(r["title"]), "body": clean(r["body"])} for r in row["reviews"]],
        "images": [i | {k: clean(i[k]) for k in ("alt", "caption", "context")} for i in row["images"]],
    }
    refined["failed_rules"], refined["drop_reason"] = verdict(refined, p)
    return refined


def refine_batch(table: pa.Table, p: Refining) -> pa.Table:
    """`DOCUMENT` rows → `REFINED` rows, one for one and in the same order."""
    return pa.Table.from_pylist(refine_rows(table.to_pylist(), p), schema=REFINED)


def judge_batch(table: pa.Table, p: Refining) -> pa.Table:
    """`REFINED` rows with their verdict taken again from their tags; no text is touched."""
    rows = table.select(["tags", "lang", "lang_score"]).to_pylist()
    verdicts = [verdict(row, p) for row in rows]
    for name, values in zip(("failed_rules", "drop_reason"), zip(*verdicts, strict=True), strict=True):
        column = table.schema.get_field_index(name)
        table = table.set_column(column, REFINED.field(name), pa.array(values, REFINED.field(name).type))
    return table


def check_rules(p: Refining) -> None:
    """Raise `ParamError` for words in lists that name no rule set, threshold, type or feature."""
    known = {
        "quality_rules": rules.RULE_SETS,
        "tag_rules": rules.RULE_SETS,
        "pii_types": pii.TYPES,
        "features": features.FEATURES,
    }
    for name, words in known.items():
        for word in getattr(p, name):
            if word not in words:
                hint = did_you_mean(word, list(words)) or f"; there are {', '.join(words)}"
                raise ParamError(f"parameter '{name}': there is no '{word}'{hint}")
    # both raise for what they cannot read, here and not in the first of a thousand tasks
    rules.overrides(tuple(p.thresholds))
    urls.blocklist(p.blocked_urls)


def refine_documents(p: RefineText, lake: Lake) -> Manifest:
    """Documents → refined documents on Spark, one part for one part.

    Where the last result differs in nothing but what judges (`RefineText.judging`), only verdicts are taken anew, from
    its tags; the same rule sets must have been measured.
    """
    check_rules(p)
    with lake.stage(p) as out:
        source, last = out.read("20_extract_text"), lake.manifest(p.run, p.stage)
        if p.blocked_urls:
            out.read_outside(p.blocked_urls)

        # the tags of the last result serve where text, masks and measured rules would come out the same
        again = last is not None and out.same_work(last, but=p.judging())
        again = again and measured_rule_sets(p) == measured_rule_sets(RefineText.parse(last.params))
        given = last if again else source
        parts = [o for o in given.outputs if o.name.startswith("part")]
        paths = lake.paths(given, "part")
        writer, step = out.parts, judge_batch if again else refine_batch

        def work(task: tuple[str, str]) -> dict[str, Any]:
            name, path = task
            table = step(lake.read_part(path), p)
            account = Account.of_verdicts(table["drop_reason"].to_pylist())
            # null is no zero: the type was not looked for
            pii_counts = Counter()
            for row in table["pii"].to_pylist():
                pii_counts.update({k: v for k, v in row.items() if v is not None})
            output = writer.table(name, table)
            return {"done": table.num_rows, "output": output, "account": account, "pii": pii_counts}

        tasks = [
            (o.rows, (o.name.removesuffix(".parquet"), path)) for o, path in zip(parts, paths, strict=True)
        ]
        results = run_tasks(p, work, tasks, "judge" if again else "refine", "documents")
        pii_counts = Counter()
        for result in results:
            out.add(result["output"])
            pii_counts.update(result["pii"])
        counts = Account.total(result["account"] for result in results).counts()
        metrics = {"pii_masked" if p.mask_pii else "pii_found": dict(sorted(pii_counts.items()))}
        return out.commit(counts, metrics | ({"only_verdicts": True} if again else {}))


class Verdicts:
    """The tags of a refined result in memory, to judge them again in milliseconds while somebody moves a slider."""

    EXCERPT = 240
    """Characters of a text that are kept in memory, to be looked at."""

    def __init__(self, lake: Lake, manifest: Manifest) -> None:
        # imported here: refining itself does without DuckDB
        import duckdb

        self.params = manifest.params
        columns = ["url", "text", "tags", "lang", "lang_score", "drop_reason"]
        tables = []
        for path in lake.paths(manifest, "part"):
            table = lake.read_part(path, columns)
            short = pc.utf8_slice_codeunits(table["text"], 0, self.EXCERPT)
            tables.append(table.set_column(table.schema.get_field_index("text"), "text", short))
        # tags as columns of a table of its own, unnested once and not in every query
        self.db = duckdb.connect()
        self.db.register("given", pa.concat_tables(tables))
        self.db.execute("CREATE TABLE given_tags AS SELECT * EXCLUDE tags, unnest(tags) FROM given")
        self.db.unregister("given")

    def _sql(self, moved: dict[str, Any]) -> str:
        """The verdict of `verdict` as an expression, NULL for what moves on."""
        p = RefineText.parse(self.params | moved)
        check_rules(p)
        params = dict(p)
        # quoted: DuckDB reads a bare number as a decimal, which as a double may be its neighbour
        language = [f"WHEN lang_score < '{p.min_lang_score}'::DOUBLE THEN 'language: uncertain'"]
        if p.keep_languages:
            kept = ", ".join("'" + code.replace("'", "''") + "'" for code in p.keep_languages)
            language.append(f"WHEN lang NOT IN ({kept}) THEN 'language: not kept'")
        scope = {"english": "lang = 'en'", "spaces": f"lang NOT IN {tuple(sorted(rules.UNSPACED_LANGUAGES))}"}
        # URL rules stand before the language, all others after it, as in `verdict`
        cases: dict[bool, list[str]] = {True: [], False: []}
        for rule in (r for r in rules.RULES if r.rule_set in p.quality_rules):
            low, high = rule.bounds(params)
            limits = [f"{rule.column} < '{low}'::DOUBLE"] if low is not None else []
            limits += [f"{rule.column} > '{high}'::DOUBLE"] if high is not None else []
            where = f" AND {scope[rule.needs]}" if rule.needs else ""
            cases[rule.rule_set == "url"].append(f"WHEN ({' OR '.join(limits)}){where} THEN '{rule.name}'")
        return f"CASE {' '.join([*cases[True], *language, *cases[False]])} END"

    def counts(self, **moved: Any) -> dict[str, int]:
        """How many documents would go for each reason, or be `kept`, if the parameters named were moved.

        Raises `ParamError` for what is no parameter of the stage or a rule set that was not measured.
        """
        reason = f"coalesce({self._sql(moved)}, 'kept')"
        query = f"SELECT {reason}, count(*) FROM given_tags GROUP BY 1 ORDER BY 2 DESC, 1"
        return dict(self.db.execute(query).fetchall())

    def changed(self, most: int = 5, **moved: Any) -> list[dict[str, Any]]:
        """Documents that would change sides, at most so many each way, with how their texts begin."""
        query = f"""WITH judged AS (SELECT *, {self._sql(moved)} AS after FROM given_tags),
            sides AS (SELECT *, row_number() OVER (PARTITION BY after IS NULL ORDER BY url) AS n FROM judged
                      WHERE (drop_reason IS NULL) <> (after IS NULL))
            SELECT coalesce(drop_reason, 'kept') AS before, coalesce(after, 'kept') AS after, lang, url, text
            FROM sides WHERE n <= {int(most)} ORDER BY after, url"""
        return self.db.execute(query).to_arrow_table().to_pylist()
