"""Documents → clusters of copies, with one kept of each.

Exact copies have the same set of word n-grams of normalised text; near copies are found by MinHash-LSH over
those sets (Broder 1997; bands as in FineWeb: 14 × 8 by default) and *verified*: only pairs whose true Jaccard
index is at least `min_jaccard` are joined, and a copy is removed only if it is that close to the one that stays.

Survivor rule `richest`: most marked-up reviews, then longest text, then earliest fetch, then lowest doc_id.
It depends on the documents alone, so partitions, retries and cores never change which copy stays.
"""

from __future__ import annotations

import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from kit.data import quality
from kit.data.spark import SparkError, collect, session
from kit.lake import Counts, Lake, Manifest, Output, write_table
from kit.params import Deduplicate
from kit.show import progress

CLUSTER = pa.schema(
    [
        ("doc_id", pa.string()),
        ("cluster_id", pa.string()),
        ("keep", pa.bool_()),
        ("reason", pa.string()),
        ("survivor", pa.string()),
        ("jaccard", pa.float32()),
    ]
)
ALL_PAIRS_UP_TO = 40
"""In larger LSH buckets each text is compared with one only: all pairs would grow with the square."""
MAX_ROUNDS = 30
COLUMNS = ["doc_id", "text", "fetch_time", "reviews"]


def normalise(text: str) -> str:
    """Lower case, digits as 0, no diacritics: what copies have in common."""
    plain = unicodedata.normalize("NFD", text.lower())
    return "".join("0" if c.isdigit() else c for c in plain if not unicodedata.combining(c))


def shingles(text: str, ngram: int) -> np.ndarray:
    """Sorted distinct 64-bit hashes of the text's word n-grams, int64; a shorter text is one shingle."""
    tokens = quality.words(normalise(text))
    codes = np.fromiter((zlib.crc32(t.encode()) for t in tokens), np.uint64, len(tokens))
    n = min(ngram, len(codes))
    if n == 0:
        return np.empty(0, np.int64)
    with np.errstate(over="ignore"):
        powers = np.cumprod(np.full(n, 0x9E3779B97F4A7C15, np.uint64))
        windows = np.lib.stride_tricks.sliding_window_view(codes, n)
        return np.unique(_mix((windows * powers).sum(axis=1, dtype=np.uint64)).view(np.int64))


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: spreads the bits of 64-bit integers."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def bands(hashes: np.ndarray, buckets: int, rows: int, seed: int) -> list[int]:
    """One int64 per LSH band: equal in two texts with probability J^rows (J = their Jaccard index)."""
    if not len(hashes):
        return []
    random = np.random.default_rng(seed)
    keys = random.integers(1, 2**63, buckets * rows, dtype=np.uint64)
    with np.errstate(over="ignore"):
        minima = np.array([_mix(hashes.view(np.uint64) ^ key).min() for key in keys]).reshape(buckets, rows)
        band = minima[:, 0].copy()
        for column in minima.T[1:]:
            band = _mix(band * np.uint64(31) + column)
        # the band's number goes in, so that equal values of two bands are no match
        return _mix(band + np.arange(buckets, dtype=np.uint64)).view(np.int64).tolist()


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Jaccard index of two sorted sets."""
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common) if len(a) + len(b) else 0.0


def _signed(lake_uri: str, paths: list[str], p: Deduplicate) -> Iterator[tuple[Any, ...]]:
    """Per kept document: id, rank of the survivor rule, shingles, bands (the last one of the whole text)."""
    fs = Lake(lake_uri).fs
    for path in paths:
        table = pq.read_table(
            path, columns=COLUMNS, filters=pc.field("drop_reason").is_null(), filesystem=fs, partitioning=None
        )
        for row in table.to_pylist():
            grams = shingles(row["text"], p.ngram)
            whole = int(np.bitwise_xor.reduce(grams)) if len(grams) else 0
            rank = f"{9999 - min(len(row['reviews']), 9999):04d}{10**9 - len(row['text']):010d}{row['fetch_time']}"
            yield (
                row["doc_id"],
                rank,
                grams.tolist(),
                [*bands(grams, p.buckets, p.hashes_per_bucket, p.seed), whole],
            )


def candidate_pairs(docs: DataFrame) -> DataFrame:
    """Pairs (a < b) of documents that share a band."""
    buckets = (
        docs.select("doc_id", F.explode("bands").alias("band"))
        .groupBy("band")
        .agg(F.array_sort(F.collect_set("doc_id")).alias("ids"))
        .where(F.size("ids") > 1)
    )
    small = buckets.where(F.size("ids") <= ALL_PAIRS_UP_TO)
    left = small.select("band", F.explode("ids").alias("a"), "ids")
    pairs = left.select("a", F.explode("ids").alias("b"))
    star = buckets.where(F.size("ids") > ALL_PAIRS_UP_TO).select(
        F.col("ids")[0].alias("a"), F.explode("ids").alias("b")
    )
    return pairs.union(star).where("a < b").distinct()


def verified_pairs(docs: DataFrame, pairs: DataFrame, min_jaccard: float) -> DataFrame:
    """The pairs whose shingle sets really overlap enough."""
    sets = docs.select("doc_id", "grams")
    joined = pairs.join(sets.toDF("a", "ga"), "a").join(sets.toDF("b", "gb"), "b")
    common = F.size(F.array_intersect("ga", "gb"))
    return joined.where(common >= min_jaccard * (F.size("ga") + F.size("gb") - common)).select("a", "b")


def components(pairs: DataFrame) -> DataFrame:
    """Connected components as (doc_id, cluster_id): each document takes the least id of its neighbours, then the
    id which that one took, until nothing changes; the jump makes a chain of n copies settle in about log n rounds.
    """
    edges = pairs.union(pairs.select("b", "a")).toDF("doc_id", "other").cache()
    labels = (
        edges.groupBy("doc_id")
        .agg(F.min("other").alias("m"))
        .select("doc_id", F.least("doc_id", "m").alias("cluster_id"))
    )
    for _ in range(MAX_ROUNDS):
        labels = labels.localCheckpoint()
        best = (
            edges.join(labels.withColumnRenamed("doc_id", "other"), "other")
            .groupBy("doc_id")
            .agg(F.min("cluster_id").alias("best"))
        )
        after = labels.join(best, "doc_id").select(
            "doc_id",
            F.least("cluster_id", "best").alias("cluster_id"),
            (F.col("best") < F.col("cluster_id")).alias("moved"),
        )
        after = after.localCheckpoint()
        if after.where("moved").isEmpty():
            edges.unpersist()
            return after.drop("moved")
        jump = after.select(F.col("doc_id").alias("cluster_id"), F.col("cluster_id").alias("least"))
        labels = after.join(jump, "cluster_id").select("doc_id", F.col("least").alias("cluster_id"))
    raise SparkError(f"clusters of copies did not settle in {MAX_ROUNDS} rounds; raise min_jaccard")


def survivors(members: Iterable[tuple[str, str, list[int]]], min_jaccard: float) -> Iterator[dict[str, Any]]:
    """Decide one cluster: `(rank, doc_id, shingles)` → rows of `CLUSTER`.

    The best-ranked document stays and takes with it what is close enough to *itself*; what is only close to
    another copy goes on to the next round, so no copy leaves without a near survivor.
    """
    left = [(doc, np.array(grams, np.int64)) for _, doc, grams in sorted(members)]
    cluster = min(doc for doc, _ in left)
    while left:
        (best, best_grams), *others = left
        left = []
        yield {
            "doc_id": best,
            "cluster_id": cluster,
            "keep": True,
            "reason": None,
            "survivor": best,
            "jaccard": 1.0,
        }
        for doc, grams in others:
            j = jaccard(best_grams, grams)
            if j >= min_jaccard:
                reason = "exact copy" if j == 1.0 else "near copy"
                yield {
                    "doc_id": doc,
                    "cluster_id": cluster,
                    "keep": False,
                    "reason": reason,
                    "survivor": best,
                    "jaccard": j,
                }
            else:
                left.append((doc, grams))


def deduplicate(p: Deduplicate, lake: Lake) -> Manifest:
    """Refined documents → `part-…`, one row of `CLUSTER` for each document that moved on so far."""
    with lake.stage(p) as out:
        source = out.read("30_refine_text")
        paths = lake.paths(source, "part")
        lake_uri, folder, attempt, n_parts = lake.uri, out.base, out.attempt, len(paths)
        spark = session(p)
        done = spark.sparkContext.accumulator(0)

        def write(share: tuple[int, Iterable[dict[str, Any]]]) -> dict[str, Any]:
            decided = sorted(share[1], key=lambda r: r["doc_id"])
            table = pa.Table.from_pylist(decided, schema=CLUSTER)
            output = write_table(lake_uri, folder, attempt, f"part-{share[0]:05d}", table)
            done.add(len(decided))
            return {"output": output.model_dump(), "reasons": Counter(r["reason"] for r in decided)}

        with progress(source.counts.records_out, "deduplicate", "documents") as bar:
            bar.note("signatures and pairs")
            rows = spark.sparkContext.parallelize(paths, n_parts)
            docs = spark.createDataFrame(
                rows.mapPartitions(lambda x: _signed(lake_uri, list(x), p)),
                "doc_id string, rank string, grams array<bigint>, bands array<bigint>",
            ).cache()
            labels = components(verified_pairs(docs, candidate_pairs(docs), p.min_jaccard))
            bar.note("survivors")
            clusters = docs.join(labels, "doc_id", "left").withColumn(
                "cluster_id", F.coalesce("cluster_id", "doc_id")
            )
            decided = (
                clusters.rdd.map(lambda r: (r.cluster_id, (r.rank, r.doc_id, r.grams)))
                .groupByKey(n_parts)
                .flatMap(lambda x: survivors(x[1], p.min_jaccard))
                .map(lambda row: (int(row["doc_id"][:6], 16) % n_parts, row))
                .groupByKey(n_parts)
            )
            results = collect(decided.map(write), done, bar)
        reasons: Counter[str | None] = Counter()
        for result in results:
            out.add(Output(**result["output"]))
            reasons.update(result["reasons"])
        docs.unpersist()
        kept = reasons.pop(None, 0)
        counts = Counts(
            records_in=source.counts.records_out, records_out=kept, dropped=dict(sorted(reasons.items()))
        )
        return out.commit(counts, {"survivor_rule": "richest", "min_jaccard": p.min_jaccard})
