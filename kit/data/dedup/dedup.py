"""Documents → clusters of copies, with one kept of each; and the lines that a site repeats on its pages.

Exact copies share their URL, the digest of their bytes, or their text. Near copies are found by MinHash-LSH over sets
of word n-grams (Broder 1997; 14 × 8 as in FineWeb) and *verified*: only pairs whose true Jaccard index is at least
`min_jaccard` are joined, and a near copy goes only if it is that close to the very document that stays.

Which copy stays is decided by the documents alone (`survivor`, then the earliest fetch, then the lowest doc_id), so
parts, retries and cores change nothing. Spark shuffles `numpy` arrays as bytes, one from each task to each: a row
for every key would cost the JVM more than all the rest. No text is shuffled, and only counts come to the driver.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from pyspark.core.rdd import RDD
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from kit.data.dedup.arrays import (
    ID,
    KEY,
    LABEL,
    PAIR,
    REASONS,
    VERDICT,
    PairJob,
    identity,
    joined,
    rows_of,
    split_by_share,
)
from kit.data.dedup.boilerplate import LINE, count_lines, repeated, spell
from kit.data.dedup.copies import (
    PAIRS_FLOOR,
    candidate_pairs,
    decide,
    label_components,
    sign,
    verify_pairs,
)
from kit.data.dedup.minhash import mix
from kit.data.dedup.schema import boilerplate_lines, without_boilerplate
from kit.data.engine.spark import collect, plan_parts, session
from kit.errors import SparkError
from kit.lake.manifest import Account, Manifest, Output
from kit.lake.store import Lake
from kit.params import Deduplicate
from kit.progress import progress

__all__ = [
    "BOILERPLATE",
    "CLUSTER",
    "NEAR",
    "boilerplate_lines",
    "clusters_at",
    "deduplicate",
    "without_boilerplate",
]

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
NEAR = pa.schema([("a", pa.string()), ("b", pa.string()), ("jaccard", pa.float32())])
BOILERPLATE = pa.schema(
    [("host", pa.string()), ("line", pa.string()), ("pages", pa.int32()), ("of_pages", pa.int32())]
)
PAIRS_KEPT = 100_000
"""Verified pairs that are kept to be looked at: a sample that depends on the documents alone."""
FEW_PAIRS = 2_000_000
"""So many are joined by one task (200 MB); more in rounds over all of Spark."""
LEAST_GROUP_BYTES, MOST_GROUP_BYTES = 1e6, 64e6
"""Compressed input of a task: one task a core within these bounds, as each task costs 60 ms of CPU before it works."""
ROWS_PER_PART, MAX_ROUNDS = 100_000, 30
Blob = tuple[int, Any]
"""What is shuffled: the number of the task it goes to, and an array."""


def deduplicate(p: Deduplicate, lake: Lake) -> Manifest:
    """Refined documents → `part-…`, one row of `CLUSTER` for each document that moved on so far; `pairs`, the
    verified ones from `PAIRS_FLOOR` on; and `boilerplate-…`, the lines that hosts repeat. Nothing is deleted.
    """
    with lake.stage(p) as out:
        source = out.read("30_refine_text")
        context = session(p).sparkContext

        # how the input is cut: a task for each core, as long as its part is neither tiny nor large
        sizes = [o.bytes for o in source.outputs if o.name.startswith("part")]
        paths, n_docs = lake.paths(source, "part"), source.counts.records_out
        # 5 % more than an even share: files do not fill a group to the byte, and one left over would be a round alone
        share = sum(sizes) / context.defaultParallelism * 1.05
        most = max(min(share, MOST_GROUP_BYTES), LEAST_GROUP_BYTES)
        groups = [[paths[i] for i in share] for share in plan_parts(sizes, most)]
        job = PairJob(p, lake, out.parts, groups, -(-n_docs // ROWS_PER_PART))
        numbers, n = context.parallelize(range(len(groups)), len(groups)), len(groups)
        done = context.accumulator(0)

        def signed(group: int) -> Iterator[Blob]:
            rows, n_signed = sign(job, group)
            done.add(n_signed)
            # by the high bits: the lowest one says what kind of key it is
            return split_by_share(rows, (rows["key"] >> np.uint64(33)) % np.uint64(n))

        with progress(n_docs, "deduplicate", "documents") as bar:
            bar.note("signatures and pairs")
            pairs = _to(_to(numbers.flatMap(signed), n).mapPartitions(_paired), n)
            # persisted: the jobs below would each sign, pair and compare anew
            verified = pairs.mapPartitions(lambda blobs: [verify_pairs(job, _one(blobs, PAIR))]).persist()
            numbers_by_task = collect(
                verified.map(lambda result: (result[0], len(_joined(result[1], p)))), done, bar
            )
            compared, n_joined = (sum(column) for column in zip(*numbers_by_task, strict=True))

            bar.note("clusters")
            # few pairs fit into the memory of one task
            labels = (_few if n_joined <= FEW_PAIRS else _many)(verified, p, n)
            decided = _to(labels, n).mapPartitions(lambda blobs: [decide(job, _one(blobs, LABEL))]).persist()
            placed = _to(decided.mapPartitionsWithIndex(partial(_placed, job)), job.parts)
            # `coalesce(1)`: one file of pairs, as it is a sample to look at
            results = collect(verified.coalesce(1).mapPartitions(partial(_write_pairs, job)), done, bar)
            results += collect(placed.mapPartitionsWithIndex(partial(_write_part, job)), done, bar)
            if p.boilerplate_pages:
                bar.note("boilerplate")
                results += collect(_boilerplate(job, decided, n), done, bar)
            verified.unpersist()
            decided.unpersist()
        for output, _ in results:
            out.add(output)
        counts = Account.total(account for _, account in results).counts()
        rules = {"survivor_rule": p.survivor, "min_jaccard": p.min_jaccard}
        return out.commit(counts, rules | {"pairs_compared": compared, "pairs_joined": n_joined})


def clusters_at(pairs: pa.Table, min_jaccard: float) -> list[int]:
    """Sizes of the clusters that the verified `pairs` would make at another threshold, largest first."""
    near = pairs.filter(np.asarray(pairs["jaccard"]) >= min_jaccard)
    # ids become numbers: those of the pairs' first ends, then those of their second ends
    ids = pa.chunked_array([*near["a"].chunks, *near["b"].chunks], pa.string()).combine_chunks()
    a, b = np.split(np.asarray(ids.dictionary_encode().indices), 2)
    labels = label_components(rows_of(PAIR, a=a, b=b, exact=False))["label"]
    return sorted(Counter(labels.tolist()).values(), reverse=True)


def _to(blobs: RDD, parts: int) -> RDD:
    """Each blob to the task it is for."""
    return blobs.partitionBy(parts, int)


def _one(blobs: Iterable[Blob], dtype: np.dtype) -> np.ndarray:
    return joined((rows for _, rows in blobs), dtype)


def _paired(blobs: Iterable[Blob]) -> Iterator[Blob]:
    pairs = candidate_pairs(_one(blobs, KEY))
    # to the task of a's group: equal pairs meet there, and half of the shingles lie in one file
    return split_by_share(pairs, pairs["a"] >> 32)


def _joined(edges: np.ndarray, p: Deduplicate) -> np.ndarray:
    """The pairs that make a cluster."""
    return edges[edges["exact"] | (edges["jaccard"] >= p.min_jaccard)][list(PAIR.names)].astype(PAIR)


def _few(verified: RDD, p: Deduplicate, n: int) -> RDD:
    """Clusters of few pairs, by one task."""

    def work(results: Iterable[Any]) -> Iterator[Blob]:
        labels = label_components(joined((_joined(edges, p) for _, edges in results), PAIR))
        return split_by_share(labels, labels["label"] % n)

    return verified.coalesce(1).mapPartitions(work)


def _many(verified: RDD, p: Deduplicate, n: int) -> RDD:
    """Clusters of many pairs, by Spark."""

    def work(rows: Iterable[Any]) -> Iterator[Blob]:
        labels = np.array([tuple(row) for row in rows], LABEL)
        return split_by_share(labels, labels["label"] % n)

    rows = verified.flatMap(lambda result: _joined(result[1], p)[["a", "b"]].tolist())
    return components(rows.toDF("a long, b long")).select("label", "doc").rdd.mapPartitions(work)


def components(pairs: DataFrame) -> DataFrame:
    """Connected components as (doc, label): each document takes the least label of its neighbours, then the one
    which that one took, until nothing changes; the jump makes a chain of n copies settle in about log n rounds.
    """
    edges = pairs.union(pairs.select("b", "a")).toDF("doc", "other").cache()
    labels = (
        edges.groupBy("doc").agg(F.min("other").alias("m")).select("doc", F.least("doc", "m").alias("label"))
    )
    for _ in range(MAX_ROUNDS):
        # without it the plan of a round holds those of all rounds before
        labels = labels.localCheckpoint()
        around = edges.join(labels.withColumnRenamed("doc", "other"), "other")
        best = around.groupBy("doc").agg(F.min("label").alias("best"))
        after = labels.join(best, "doc").select(
            "doc", F.least("label", "best").alias("label"), (F.col("best") < F.col("label")).alias("moved")
        )
        after = after.localCheckpoint()
        if after.where("moved").isEmpty():
            edges.unpersist()
            return after.drop("moved")
        jump = after.select(F.col("doc").alias("label"), F.col("label").alias("least"))
        labels = after.join(jump, "label").select("doc", F.col("least").alias("label"))
    raise SparkError(f"clusters of copies did not settle in {MAX_ROUNDS} rounds; raise min_jaccard")


def _placed(job: PairJob, group: int, verdicts: Iterable[np.ndarray]) -> Iterator[Blob]:
    """The ids of a group's documents, and some verdicts, to the parts where they are written."""
    # all ids, since most documents are in no cluster and get no verdict; parts are cut by the hash of the id, so that
    # a part holds the same documents however the input was cut
    for rows in (job.signed(group)["doc_id"], *verdicts):
        ids = rows if rows.dtype == ID else rows["doc_id"]
        yield from split_by_share(rows, identity(ids) % np.uint64(job.parts))


def _write_part(job: PairJob, number: int, blobs: Iterable[Blob]) -> Iterator[tuple[Output, Account]]:
    """One output part; documents without a verdict are alone."""
    arrays = [rows for _, rows in blobs]
    ids = np.sort(joined((rows for rows in arrays if rows.dtype == ID), np.dtype(ID)))
    part = rows_of(VERDICT, doc_id=ids, cluster_id=ids, survivor=ids, reason=0, jaccard=1.0, doc=0)
    verdicts = joined((rows for rows in arrays if rows.dtype == VERDICT), VERDICT)
    part[ids.searchsorted(verdicts["doc_id"])] = verdicts
    reasons = pa.array(REASONS).take(pa.array(part["reason"]))
    keep = pa.array(part["reason"] == 0)
    doc, cluster, survivor = (_strings(part[name]) for name in ("doc_id", "cluster_id", "survivor"))
    columns = [doc, cluster, keep, reasons, survivor, part["jaccard"].astype(np.float32)]
    output = job.writer.table(f"part-{number:05d}", pa.table(columns, schema=CLUSTER))
    yield output, Account.of_verdicts(reasons.to_pylist())


def _write_pairs(job: PairJob, results: Iterable[Any]) -> Iterator[tuple[Output, Account]]:
    """At most `PAIRS_KEPT` of the pairs that are close, the same ones however the work is cut."""
    kept = None
    for _, edges in results:
        close = edges[edges["jaccard"] >= PAIRS_FLOOR]
        kept = close if kept is None else np.concatenate([kept, close])
        # the least by a hash of both ids: a random sample that is the same whatever came first
        kept = kept[(identity(kept["a_id"]) ^ mix(identity(kept["b_id"]))).argsort()[:PAIRS_KEPT]]
    kept = kept[np.lexsort((kept["b_id"], kept["a_id"]))]
    columns = [_strings(kept["a_id"]), _strings(kept["b_id"]), kept["jaccard"].astype(np.float32)]
    yield job.writer.table("pairs", pa.table(columns, schema=NEAR)), Account()


def _boilerplate(job: PairJob, decided: RDD, n: int) -> RDD:
    """Lines counted by group, summed by host, spelled by group, written by host."""

    def counted(group: int, blobs: Iterable[Blob]) -> Iterator[Blob]:
        rows = count_lines(job.pages(group), {doc for _, rows in blobs for doc in rows["doc"].tolist()})
        return split_by_share(rows, rows["host"] % np.uint64(n))

    def summed(blobs: Iterable[Blob]) -> Iterator[Blob]:
        rows = repeated(_one(blobs, LINE), job.p)
        return split_by_share(rows, rows["doc"] >> 32)

    def spelled(group: int, blobs: Iterable[Blob]) -> Iterator[Blob]:
        lines = list(spell(job.pages(group), _one(blobs, LINE)))
        # a host name has at most 253 bytes
        shares = identity(np.array([line["host"].encode() for line in lines], "S256")) % np.uint64(job.parts)
        return zip(shares.tolist(), lines, strict=True)

    def write(number: int, blobs: Iterable[Blob]) -> Iterator[tuple[Output, Account]]:
        lines = sorted((line for _, line in blobs), key=lambda line: (line["host"], line["line"]))
        if lines:
            table = pa.Table.from_pylist(lines, schema=BOILERPLATE)
            yield job.writer.table(f"boilerplate-{number:05d}", table), Account()

    def copies(verdicts: np.ndarray) -> Iterator[Blob]:
        gone = verdicts[verdicts["reason"] > 0]
        return split_by_share(gone, gone["doc"] >> 32)

    gone = decided.flatMap(copies)
    # four shuffles of small arrays, so that the words of a line cross the network once, from one page that has it
    sums = _to(_to(gone, n).mapPartitionsWithIndex(counted), n).mapPartitions(summed)
    words = _to(_to(sums, n).mapPartitionsWithIndex(spelled), job.parts)
    return words.mapPartitionsWithIndex(write)


def _strings(ids: np.ndarray) -> pa.Array:
    return pa.array(np.ascontiguousarray(ids), pa.binary()).cast(pa.string())
