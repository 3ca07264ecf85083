"""Copies: all exact ones found, near ones verified, and the same one stays however the work is cut."""

import random
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from conftest import run_data_stages

from kit.data import quality
from kit.data.dedup import (
    CLUSTER,
    bands,
    components,
    deduplicate,
    jaccard,
    normalise,
    shingles,
    survivors,
)
from kit.data.spark import session
from kit.lake import Counts, Lake, Output, write_table
from kit.params import Cores, Deduplicate

P = Deduplicate()


def naive(a: str, b: str, ngram: int = 5) -> float:
    """Jaccard index over sets of word tuples."""
    sets = []
    for text in (a, b):
        words = quality.words(normalise(text))
        n = min(ngram, len(words))
        sets.append({tuple(words[i : i + n]) for i in range(len(words) - n + 1)} if n else set())
    union = sets[0] | sets[1]
    return len(sets[0] & sets[1]) / len(union) if union else 0.0


def test_normalise() -> None:
    assert normalise("Café ÉTÉ 2026, ½ ４２") == "cafe ete 0000, ½ 00"


@pytest.mark.parametrize("ngram", [1, 2, 5])
def test_shingles_and_jaccard_are_those_of_plain_sets(ngram: int) -> None:
    pick = random.Random(1)
    texts = ["", "one", "one two", "!?", "中文字符没有空格的文本"]
    texts += [" ".join(pick.choices("abcdefgh", k=pick.randint(1, 60))) for _ in range(40)]
    for a, b in pairwise(texts):
        grams = shingles(a, ngram)
        assert np.array_equal(grams, np.unique(grams))
        assert jaccard(grams, shingles(b, ngram)) == pytest.approx(naive(a, b, ngram))


@pytest.mark.parametrize("similarity", [0.5, 0.8, 0.9])
def test_bands_collide_as_often_as_the_theory_says(similarity: float) -> None:
    random_numbers, size = np.random.default_rng(0), 1000
    shared = round(2 * size * similarity / (1 + similarity))
    tries, hits = 150, 0
    for _ in range(tries):
        numbers = random_numbers.integers(-(2**63), 2**63, 2 * size - shared, dtype=np.int64)
        one, other = bands(numbers[:size], 14, 8, 0), bands(numbers[size - shared :], 14, 8, 0)
        hits += bool(set(one) & set(other))
    assert hits / tries == pytest.approx(1 - (1 - similarity**8) ** 14, abs=0.1)


@pytest.fixture(scope="session")
def decided(data_lake: Lake, refined: dict) -> dict[str, dict]:
    """The verdict on every document that came so far, by URL."""
    url = {d["doc_id"]: u for u, d in refined.items()}
    rows = data_lake.table(data_lake.need("sample", "40_deduplicate"))
    assert rows.schema == CLUSTER
    return {url[r["doc_id"]]: r for r in rows.to_pylist()}


def test_every_document_that_moved_on_is_decided_once(decided: dict, refined: dict, data_lake: Lake) -> None:
    assert set(decided) == {u for u, d in refined.items() if d["drop_reason"] is None}
    counts = data_lake.need("sample", "40_deduplicate").counts
    assert counts.records_out == sum(r["keep"] for r in decided.values())
    assert counts.dropped == Counter(r["reason"] for r in decided.values() if not r["keep"])


def test_no_copy_leaves_without_a_near_survivor(decided: dict, refined: dict) -> None:
    text = {d["doc_id"]: d["text"] for d in refined.values()}
    kept = {r["doc_id"] for r in decided.values() if r["keep"]}
    removed = [r for r in decided.values() if not r["keep"]]
    assert len(removed) > 50
    for r in removed:
        assert r["survivor"] in kept
        true = naive(text[r["doc_id"]], text[r["survivor"]])
        assert true >= P.min_jaccard
        assert r["jaccard"] == pytest.approx(true, abs=1e-6)
        assert (r["reason"] == "exact copy") == (true == 1.0)


def test_all_planted_exact_copies_are_found(decided: dict, crawl_planted: dict) -> None:
    both = [
        (x["url"], x["of"]) for x in crawl_planted["exact_duplicate"] if {x["url"], x["of"]} <= set(decided)
    ]
    found = [decided[a]["cluster_id"] == decided[b]["cluster_id"] for a, b in both]
    print(f"exact copies: recall {sum(found) / len(found):.2f} of {len(found)}")
    assert len(found) >= 28 and all(found)
    assert all(decided[a]["keep"] + decided[b]["keep"] <= 1 for a, b in both)


def test_planted_near_copies_are_found_as_often_as_the_theory_says(
    decided: dict, refined: dict, crawl_planted: dict
) -> None:
    by_band: dict[str, list[bool]] = {}
    found, theory = 0, 0.0
    for x in crawl_planted["near_duplicate"]:
        a, b = x["url"], x["of"]
        if {a, b} <= set(decided):
            true = naive(refined[a]["text"], refined[b]["text"])
            same = decided[a]["cluster_id"] == decided[b]["cluster_id"]
            # the article alone is nearer to its copy than the extracted page, which has more around it
            for kind, value in (("planted", x["jaccard"]), ("extracted", true)):
                by_band.setdefault(f"{kind} {int(value * 20) / 20:.2f}", []).append(same)
            if true >= P.min_jaccard:
                found, theory = found + same, theory + 1 - (1 - true**P.hashes_per_bucket) ** P.buckets
    for band, hits in sorted(by_band.items()):
        print(f"near copies, Jaccard {band}…: recall {sum(hits) / len(hits):.2f} of {len(hits)}")
    print(f"near copies, extracted Jaccard ≥ {P.min_jaccard}: {found} found, theory {theory:.1f}")
    assert found >= 0.8 * theory > 10


def members(texts: dict[str, str]) -> list[tuple[str, str, list[int]]]:
    """A cluster for `survivors`: the longer text ranks first."""
    return [(f"{10**6 - len(t):09d}", doc, shingles(t, 1).tolist()) for doc, t in texts.items()]


def test_a_chain_loses_only_what_is_near_the_one_that_stays() -> None:
    words = "abcdefghijklmnop"
    a, b, c = (" ".join(words[i : i + 10]) for i in (0, 2, 4))
    assert naive(a, b, 1) == naive(b, c, 1) == 8 / 12 and naive(a, c, 1) == 6 / 14
    best = {r["doc_id"]: r for r in survivors(members({"a": a + " a a a", "b": b, "c": c}), 0.6)}
    assert [best[x]["survivor"] for x in "abc"] == ["a", "a", "c"]
    assert {r["cluster_id"] for r in best.values()} == {"a"}
    middle = {r["doc_id"]: r for r in survivors(members({"a": a, "b": b + " b b b", "c": c}), 0.6)}
    assert [middle[x]["survivor"] for x in "abc"] == ["b", "b", "b"]


def test_survivors_do_not_depend_on_the_order_of_the_input() -> None:
    pick = random.Random(2)
    texts = {
        f"d{i}": " ".join(c for c in "abcdefghijklmnopqrstuvwxyz" if pick.random() < 0.85) for i in range(12)
    }
    rows = members(texts)
    first = list(survivors(rows, 0.7))
    for _ in range(5):
        pick.shuffle(rows)
        assert list(survivors(rows, 0.7)) == first


def test_components_of_a_long_chain_and_two_islands() -> None:
    spark = session(Cores(cores=2))
    chain = [f"c{i:03d}" for i in range(40)]
    edges = [*pairwise(chain), ("x1", "x2"), ("y1", "y3"), ("y2", "y3")]
    pick = random.Random(3)
    pick.shuffle(edges)
    found = components(spark.createDataFrame(edges, "a string, b string")).collect()
    labels = {r.doc_id: r.cluster_id for r in found}
    assert labels == dict.fromkeys(chain, "c000") | {"x1": "x1", "x2": "x1"} | dict.fromkeys(
        ("y1", "y2", "y3"), "y1"
    )


def test_the_same_rows_however_the_input_is_cut(data_lake: Lake, decided: dict) -> None:
    """One and seven input parts, shuffled: the same documents stay, for the same reasons."""
    source = data_lake.need("sample", "30_refine_text")
    table = data_lake.table(source)
    order = list(range(table.num_rows))
    random.Random(4).shuffle(order)
    wanted = sorted(decided.values(), key=lambda r: r["doc_id"])
    for parts in (1, 7):
        outputs: list[Output] = []
        for i in range(parts):
            share = table.take(order[i::parts])
            folder = data_lake.folder(f"cut{parts}", "30_refine_text")
            outputs.append(write_table(data_lake.uri, folder, "a", f"part-{i:05d}", share))
        cut = source.model_copy(update={"run": f"cut{parts}", "outputs": outputs})
        data_lake.fs.pipe_file(f"{folder}/_manifest.json", cut.model_dump_json().encode())
        found = deduplicate(Deduplicate(run=f"cut{parts}", lake=data_lake.uri, cores=2), data_lake)
        rows = data_lake.table(found).to_pylist()
        assert sorted(rows, key=lambda r: r["doc_id"]) == wanted
        assert isinstance(found.counts, Counts)


def test_the_same_bytes_on_one_and_two_cores(tmp_path) -> None:
    """Stages 20 to 40, where parts are written by Spark's workers."""
    lake = Lake(str(tmp_path))
    values = {"domains": ["reelnotes.example", "cinema-mirror.example"], "max_pages": 250, "part_mb": 0.2}
    for cores in (2, 1):
        run_data_stages(lake, f"on{cores}", "40", cores=cores, **values)
    session(Cores(cores=2))
    for stage in ("20_extract_text", "30_refine_text", "40_deduplicate"):
        one, two = (lake.need(run, stage) for run in ("on1", "on2"))
        assert one.content_sha256 == two.content_sha256, stage
        assert len(one.outputs) > 2
        assert one.metrics == two.metrics
    assert one.counts.dropped, "no copy in the slice: the comparison says little"
