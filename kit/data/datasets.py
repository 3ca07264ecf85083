"""Documents → training rows, held-out rows and preference pairs, each leading back to its document.

Where the crawl has marked-up reviews, a row is one review: a prompt that names its subject, completed by what
the reader wrote. Where it has none, a row is a whole document. Readers' helpful votes on reviews of the same
subject make preference pairs. Splits follow groups (subject, or site and cluster), so nothing leaks.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from kit.lake import Counts, Lake, LakeError, Manifest
from kit.params import BuildDatasets, ParamError

ROW = pa.schema(
    [
        ("row_id", pa.string()),
        ("doc_id", pa.string()),
        ("kind", pa.string()),
        ("item", pa.string()),
        ("rating", pa.float32()),
        ("prompt", pa.string()),
        ("completion", pa.string()),
        ("language", pa.string()),
        ("host", pa.string()),
        ("group", pa.string()),
    ]
)
PAIR = pa.schema(
    [
        ("pair_id", pa.string()),
        ("prompt", pa.string()),
        ("chosen", pa.string()),
        ("rejected", pa.string()),
        ("item", pa.string()),
        ("chosen_row", pa.string()),
        ("rejected_row", pa.string()),
        ("chosen_helpful", pa.float32()),
        ("rejected_helpful", pa.float32()),
        ("split", pa.string()),
    ]
)


def row_id(*parts: object) -> str:
    """Identity of a row or pair: a hash of what it was made from."""
    return hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=10).hexdigest()


def review_rows(doc: dict[str, Any], p: BuildDatasets) -> list[dict[str, Any]]:
    """One row for each review of the document whose subject is of a wanted type."""
    rows = []
    for number, review in enumerate(doc["reviews"]):
        if review["item"] and (not p.item_types or review["item_type"] in p.item_types):
            rows.append(
                _row(
                    doc, number, "review", p.prompt_template.format(item=review["item"]), " " + review["body"]
                )
                | {"item": review["item"], "rating": review["rating"], "group": review["item"].casefold()}
                | {"helpful": review["helpful"], "votes": review["votes"]}
            )
    return rows


def _row(doc: dict[str, Any], number: int, kind: str, prompt: str, completion: str) -> dict[str, Any]:
    return {
        "row_id": row_id(doc["doc_id"], kind, number),
        "doc_id": doc["doc_id"],
        "kind": kind,
        "prompt": prompt,
        "completion": completion,
        "language": doc["lang"],
        "host": doc["host"],
    }


def site_groups(docs: list[dict[str, Any]]) -> dict[str, str]:
    """Group of each document such that neither a site nor a cluster of copies is in two groups."""
    parent: dict[str, str] = {}

    def find(x: str) -> str:
        while parent.setdefault(x, x) != x:
            parent[x] = parent[parent[x]]
            x = parent[x]
        return x

    for doc in docs:
        a, b = sorted((find(f"host {doc['host']}"), find(f"cluster {doc['cluster_id']}")))
        parent[b] = a
    return {doc["doc_id"]: find(f"host {doc['host']}") for doc in docs}


def heldout_groups(groups: set[str], share: float, seed: int) -> set[str]:
    """About `share` of the groups, by a hash of their names: adding data moves no group to the other side.

    At least one is held out and at least one is left (of so few groups, which one may change); raises `LakeError` when there is only one group.
    """
    if len(groups) < 2:
        raise LakeError("all rows are of one subject or site: there is nothing to hold out without a leak")
    order = sorted(groups, key=lambda g: row_id(seed, g))
    limit = int(share * 16**8)
    chosen = [g for g in order if int(row_id(seed, g)[:8], 16) < limit]
    return set(chosen[: len(groups) - 1] or order[:1])


def preference_pairs(rows: list[dict[str, Any]], p: BuildDatasets) -> Iterator[dict[str, Any]]:
    """Pairs of reviews of one subject that readers found clearly more and clearly less helpful."""
    by_item: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["kind"] == "review" and (row["votes"] or 0) >= p.min_votes:
            by_item[row["group"]].append(row)
    for item in sorted(by_item):
        for a, b in combinations(by_item[item], 2):
            worse, better = sorted((a, b), key=lambda r: r["helpful"] / r["votes"])
            shares = [r["helpful"] / r["votes"] for r in (better, worse)]
            if shares[0] - shares[1] >= p.min_helpful_gap:
                yield {
                    "pair_id": row_id(better["row_id"], worse["row_id"]),
                    "prompt": better["prompt"],
                    "chosen": better["completion"],
                    "rejected": worse["completion"],
                    "item": better["item"],
                    "chosen_row": better["row_id"],
                    "rejected_row": worse["row_id"],
                    "chosen_helpful": shares[0],
                    "rejected_helpful": shares[1],
                    "split": better["split"],
                }


def build_rows(docs: list[dict[str, Any]], p: BuildDatasets) -> tuple[list[dict[str, Any]], Counts]:
    """Rows of `ROW` with `split`, and the account: documents in + rows created = rows out + dropped."""
    dropped: Counter[str] = Counter()
    wanted = [d for d in docs if not p.train_languages or d["lang"] in p.train_languages]
    dropped["language not in train_languages"] = len(docs) - len(wanted)
    found = [(doc, review_rows(doc, p)) for doc in wanted] if p.prefer_reviews else []
    use_reviews = any(rows for _, rows in found)
    groups = site_groups(wanted)
    rows: list[dict[str, Any]] = []
    created = 0
    seen: set[tuple[str, str]] = set()
    for doc, reviews in found if use_reviews else [(d, None) for d in wanted]:
        made = (
            reviews
            if use_reviews
            else [_row(doc, 0, "document", "", doc["text"]) | {"group": groups[doc["doc_id"]]}]
        )
        if not made:
            dropped["no review of item_types"] += 1
        created += max(len(made) - 1, 0)
        for row in made:
            key = (row["prompt"], row["completion"])
            if key in seen:
                dropped["row already there"] += 1
            else:
                seen.add(key)
                rows.append(row)
    if not rows:
        raise LakeError(f"no training row out of {len(docs)} documents: {dict(dropped)}; see train_languages")
    heldout = heldout_groups({r["group"] for r in rows}, p.heldout_share, p.seed)
    for row in rows:
        row["split"] = "heldout" if row["group"] in heldout else "train"
    reasons = {k: v for k, v in sorted(dropped.items()) if v}
    return rows, Counts(records_in=len(docs), created=created, records_out=len(rows), dropped=reasons)


def read_documents(lake: Lake, refined: Manifest, clusters: Manifest) -> list[dict[str, Any]]:
    """The documents that refining and deduplication kept, with their `cluster_id`, in the order of the parts."""
    decided = lake.table(clusters, "part", ["doc_id", "cluster_id", "keep"])
    cluster = dict(
        zip(*(decided.filter(decided["keep"])[c].to_pylist() for c in ("doc_id", "cluster_id")), strict=True)
    )
    table = lake.table(refined, "part", ["doc_id", "host", "lang", "text", "reviews", "drop_reason"])
    kept = table.filter(pc.is_in(table["doc_id"], pa.array(list(cluster), pa.string())))
    return [d | {"cluster_id": cluster[d["doc_id"]]} for d in kept.to_pylist()]


def card(
    rows: list[dict[str, Any]], pairs: list[dict[str, Any]], p: BuildDatasets, masked: dict[str, int]
) -> str:
    """The data card: what is in the set, where it came from, and what is not known about it."""

    def table(name: str, counts: Counter) -> str:
        lines = [f"| {k} | {v} |" for k, v in counts.most_common(12)]
        return "\n".join([f"| {name} | rows |", "|---|---|", *lines])

    return f"""# Data card: run {p.run}

{len(rows)} rows ({Counter(r["split"] for r in rows)["heldout"]} held out by group) and {len(pairs)} preference pairs.

{table("kind", Counter(r["kind"] for r in rows))}

{table("language", Counter(r["language"] for r in rows))}

{table("site", Counter(r["host"] for r in rows))}

Licences of the pages: unknown unless the site says so. Authors' names: not kept. Personal data masked before:
{", ".join(f"{k} {v}" for k, v in masked.items()) or "none"}. Parameters: {json.dumps(p.identity(), sort_keys=True)}
"""


def build_datasets(p: BuildDatasets, lake: Lake) -> Manifest:
    """Documents → `train`, `heldout`, `preferences` (Parquet and JSON Lines), `train.txt` and `card.md`.

    Raises `LakeError` when no row is left or nothing can be held out without a leak, `ParamError` for a template
    that cannot be filled in.
    """
    try:
        p.prompt_template.format(item="")
    except (KeyError, IndexError, ValueError, AttributeError):
        raise ParamError("parameter 'prompt_template': {item} is all that may stand in braces") from None
    with lake.stage(p) as out:
        refined, clusters = out.read("30_refine_text"), out.read("40_deduplicate")
        rows, counts = build_rows(read_documents(lake, refined, clusters), p)
        pairs = list(preference_pairs(rows, p))
        splits = {s: [r for r in rows if r["split"] == s] for s in ("train", "heldout")}
        for name, part in splits.items():
            out.table(name, pa.Table.from_pylist(part, schema=ROW))
            lines = [
                {"text": r["prompt"] + r["completion"], "row_id": r["row_id"], "doc_id": r["doc_id"]}
                for r in part
            ]
            out.bytes(f"{name}.jsonl", _jsonl(lines), rows=len(part))
        text = "\n\n".join(r["prompt"] + r["completion"] for r in splits["train"])
        out.bytes("train.txt", text.encode(), rows=len(splits["train"]))
        if pairs:
            out.table("preferences", pa.Table.from_pylist(pairs, schema=PAIR))
            out.bytes("preferences.jsonl", _jsonl(pairs), rows=len(pairs))
        masked = refined.metrics.get("pii_masked", {})
        out.bytes("card.md", card(rows, pairs, p, masked).encode())
        return out.commit(
            counts, {"train": len(splits["train"]), "heldout": len(splits["heldout"]), "pairs": len(pairs)}
        )


def _jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode("utf-8", "replace")
