"""Documents and files → training rows, held-out rows and preference pairs, each leading back to where it came from.

Where the crawl has marked-up reviews, a row is one review; where it has none, a row is a whole document; each line
of an instruction file is a row. Splits follow groups (subject, site and cluster, question), so nothing leaks.

Everything is read twice, a part at a time: once to find the groups, once to write shards as they fill. What grows
with the data is about 1 KB a row (hashes and group names), reviews with votes, preference pairs, `train.txt`.
"""

from __future__ import annotations

import html
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from kit.data.datasets import formats
from kit.data.datasets.formats import FORMATS, Made, Row, fold, jsonl, row_id
from kit.data.datasets.preferences import PAIR, build_pairs
from kit.data.datasets.shards import Shards
from kit.data.dedup.schema import boilerplate_lines, without_boilerplate
from kit.errors import LakeError, ParamError
from kit.lake.manifest import Account, Input, Manifest
from kit.lake.store import Lake
from kit.params import BuildDatasets, did_you_mean
from kit.show import printable

SPLITS = ("train", "heldout")


class Groups:
    """Names that must not be parted: union-find; a group is called by the least of its names.

    Sites sort before copies and questions before passages, so that a new page moves no site to the other side.
    """

    def __init__(self) -> None:
        self.parent: dict[str, str] = {}

    def find(self, name: str) -> str:
        """The group of a name."""
        while self.parent.setdefault(name, name) != name:
            self.parent[name] = self.parent[self.parent[name]]
            name = self.parent[name]
        return name

    def join(self, names: list[str]) -> None:
        """Put the groups of `names` together."""
        least, *others = sorted({self.find(n) for n in names})
        self.parent.update(dict.fromkeys(others, least))


def heldout_groups(groups: set[str], share: float, seed: int) -> set[str]:
    """About `share` of the groups, by a hash of their names: adding data moves no group to the other side.

    At least one is held out and one left (of so few, which one may change); raises `LakeError` when there is one only.
    """
    if len(groups) < 2:
        raise LakeError(
            "all rows are of one subject or site: there is nothing to hold out without a leak; see item_types"
        )
    order = sorted(groups, key=lambda g: row_id(seed, g))
    chosen = [g for g in order if formats.on_far_side(g, share, seed)]
    return set(chosen[: len(groups) - 1] or order[:1])


@dataclass
class Splits:
    """Groups, those held out, and hashes of the texts trained on; built by a first look at every row."""

    groups: Groups
    heldout: set[str]
    trained: set[str]

    @classmethod
    def plan(cls, candidates: Iterable[Made], p: BuildDatasets) -> Splits:
        """Raises `LakeError` when there is no row, or only one group of rows."""
        groups, texts, lost = Groups(), [], Counter[str]()
        for candidate in candidates:
            lost[candidate.dropped or candidate.failed] += not candidate.rows
            for row in candidate.rows:
                groups.join(row["keys"])
                texts.append((text_key(row), row["keys"][0]))
        if not texts:
            raise LakeError(
                f"no training row out of {lost.total()} records: {dict(lost)}; see train_languages"
            )
        heldout = heldout_groups({groups.find(key) for _, key in texts}, p.heldout_share, p.seed)
        return cls(groups, heldout, {text for text, key in texts if groups.find(key) not in heldout})


def text_key(row: Row) -> str:
    """What must not be trained on and tested on: a text, or an answer with its question ("Yes." is no leak)."""
    return row_id(fold(row["question"] * (row["kind"] == "instruction")), fold(row["completion"]))


def split_rows(candidates: Iterable[Made], splits: Splits, account: Account) -> Iterator[Row]:
    """The rows with `group` and `split`, each text once, noted in `account`: records in + rows created = out + lost."""
    seen: set[str] = set()
    for candidate in candidates:
        formats.note(account, candidate)
        for row in candidate.rows:
            row["group"] = splits.groups.find(row["keys"][0])
            row["split"] = "heldout" if row["group"] in splits.heldout else "train"
            key = row_id(row["prompt"], row["completion"])
            if key in seen:
                account.dropped["row already there"] += 1
            elif row["split"] == "heldout" and text_key(row) in splits.trained:
                account.dropped["held-out text also in train"] += 1
            else:
                seen.add(key)
                account.records_out += 1
                yield row


def read_documents(
    lake: Lake, refined: Manifest, kept: dict[str, str], columns: Iterable[str] = ("text", "reviews")
) -> Iterator[Row]:
    """Documents that refining and deduplication kept (`kept`: doc_id → cluster_id), one part in memory at a time."""
    ids = pa.array(list(kept), pa.string())
    for path in lake.paths(refined, "part"):
        table = lake.read_part(path, ["doc_id", "url", "host", "lang", *columns])
        for doc in table.filter(pc.is_in(table["doc_id"], ids)).to_pylist():
            yield doc | {"cluster_id": kept[doc["doc_id"]]}


class Facts:
    """What the card tells of the rows, counted as they pass."""

    def __init__(self) -> None:
        self.by: dict[str, Counter[Any]] = defaultdict(Counter)

    def add(self, row: Row) -> None:
        """Count a row."""
        labels = {name: row[name] for name in ("split", "kind", "language", "licence")}
        labels["site or file"] = (
            row["host"] or (row.get("source") or "").rpartition(":")[0].rpartition("/")[2]
        )
        labels["rating"] = None if row.get("rating") is None else f"{row['rating']:.3g}"
        labels["label"] = {None: "none", 0: "0 (negative)", 1: "1 (positive)"}[row["label"]]
        labels["words"] = len(row["completion"].split())
        for name, value in labels.items():
            self.by[name][value] += 1

    def table(self, name: str, top: int = 20) -> str:
        """The most frequent values."""
        counts = self.by[name].most_common(top)
        others = self.by[name].total() - sum(n for _, n in counts)
        return grid([name, "rows"], counts + ([("others", others)] if others else []))

    def card(self, p: BuildDatasets, report: list[Row], read: list[Input], masked: dict[str, int]) -> str:
        """The data card: what is in the set, where it came from, and what is not known about it."""
        names = ("split", "kind", "language", "site or file", "rating", "label", "licence")
        words = sorted(self.by["words"].elements())
        lengths = [(f"{q} %", words[(len(words) - 1) * q // 100]) for q in (5, 25, 50, 75, 95, 100)]
        parts = [
            f"# Data card: run {plain(p.run)}",
            f"{len(words)} rows from {len(self.by['site or file'])} sites or files, held out by group.",
            *map(self.table, names),
            grid(["of rows have at most", "words (by white space)"], lengths),
            "Licences of pages are unknown unless the site says so; those of files are what their lines say. "
            "Labels: three to five stars of five are 1, fewer are 0. Authors' names are not kept.",
            f"Masked in pages before: {', '.join(f'{v} {k}' for k, v in masked.items() if v) or 'nothing'}. "
            "Rows of files are as they came: no personal data is masked in them.",
            "## Preference pairs",
            grid(["check", "pairs", "dropped", "note"], [r.values() for r in report]),
            "## Made from",
            grid(["input", "content sha256"], [(i.uri, i.content_sha256) for i in read]),
            f"```json\n{json.dumps(p.identity(), sort_keys=True)}\n```\n",
        ]
        return "\n\n".join(parts)


def plain(value: Any) -> str:
    """Text from the web as plain text in Markdown: on one line, nothing in it is mark-up."""
    text = printable(" ".join(str("unknown" if value is None else value).split()))[:120]
    return re.sub(r"([\\`*_\[\]|#~!$])", r"\\\1", html.escape(text, quote=False))


def grid(names: list[str], rows: Iterable[Iterable[Any]]) -> str:
    """A Markdown table."""
    lines = [names, ["---"] * len(names), *([plain(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def candidate_rows(
    lake: Lake, refined: Manifest, clusters: Manifest, files: list[tuple[str, str]], p: BuildDatasets
) -> Callable[[], Iterator[Made]]:
    """A function that goes through all records, documents first, and makes their rows; the same ones each time."""
    decided = lake.table(clusters, "part", ["doc_id", "cluster_id", "keep"])
    decided = decided.filter(decided["keep"])
    kept = dict(zip(*(decided[c].to_pylist() for c in ("doc_id", "cluster_id")), strict=True))
    reviews = p.prefer_reviews and any(
        formats.document_rows(d | {"text": ""}, p, True).rows
        for d in read_documents(lake, refined, kept, ["reviews"])
    )
    repeated = boilerplate_lines(lake, clusters) if p.drop_boilerplate and not reviews else {}

    def made() -> Iterator[Made]:
        for doc in read_documents(lake, refined, kept):
            lines = repeated.get(doc["host"] or "", frozenset())
            doc["text"] = without_boilerplate(doc["text"], lines) if lines else doc["text"]
            yield formats.document_rows(doc, p, reviews)
        for name, uri in files:
            yield from (
                formats.instruction_row(line, f"{name}:{n}", p) for n, line in formats.json_lines(uri)
            )

    return made


def build_datasets(p: BuildDatasets, lake: Lake) -> Manifest:
    """Documents and files → Parquet shards `train`, `heldout`, `preferences` for the kit; for everyone JSON Lines
    shards FORMAT-SPLIT (`text-train-00000.jsonl`) and `preferences`, `train.txt` and `card.md`.

    Metrics hold the pairs' own account and the validator's report. Raises `LakeError` when no row is left or nothing
    can be held out without a leak, `ParamError` for a template that cannot be filled in or an unknown format.
    """
    check_templates(p)
    with lake.stage(p) as out:
        refined, clusters = out.read("30_refine_text"), out.read("40_deduplicate")
        files, pair_files = (
            [(name, out.read_outside(name)) for name in names]
            for names in (p.instruction_files, p.preference_files)
        )
        candidates = candidate_rows(lake, refined, clusters, files, p)
        splits, account = Splits.plan(candidates(), p), Account()
        shards, facts = Shards(out, p.shard_mb), Facts()
        voted, text, sides = [], bytearray(), {}
        for row in split_rows(candidates(), splits, account):
            facts.add(row)
            shards.add_row(row, p.formats)
            if row["split"] == "train":
                text += f"{row['prompt']}{row['completion']}\n\n".encode()
            if row["question"]:
                sides[formats.question_group(row["question"])] = row["split"]
            if (row.get("votes") or 0) >= p.min_votes:
                voted.append(row)
        del text[-2:]
        out.bytes("train.txt", text, rows=shards.rows["train.parquet"])
        pairs, report, pair_counts = build_pairs(voted, pair_files, sides, p)
        for pair in pairs:
            pair = {k: pair.get(k) for k in PAIR.names}
            shards.add("preferences.parquet", pair)
            # `datasets` takes the types of the first shard for all: there, null would be a type of its own
            line = {k: v if "_helpful" in k else v or "" for k, v in pair.items()}
            shards.add("preferences.jsonl", jsonl(line))
        shards.flush(*sorted(shards.items))
        out.bytes(
            "card.md", facts.card(p, report, out.inputs, refined.metrics.get("pii_masked", {})).encode()
        )
        written = {form: sum(shards.rows[f"{form}-{s}.jsonl"] for s in SPLITS) for form in p.formats}
        metrics = {s: shards.rows[f"{s}.parquet"] for s in SPLITS} | {"pairs": len(pairs), "formats": written}
        return out.commit(
            account.counts(by_name=False),
            metrics | {"pair_counts": pair_counts.model_dump(), "pair_report": report},
        )


def check_templates(p: BuildDatasets) -> None:
    """Raise `ParamError` for a template that cannot be filled in or a format that there is not."""
    try:
        p.prompt_template.format(item="")
    except (KeyError, IndexError, ValueError, AttributeError):
        raise ParamError("parameter 'prompt_template': {item} is all that may stand in braces") from None
    for name in p.formats:
        if name not in FORMATS:
            raise ParamError(
                f"parameter 'formats': unknown format '{name}'{did_you_mean(name, list(FORMATS))}"
            )
