"""Copies: all exact ones found, near ones verified, and the same one stays however the work is cut."""

import random
from collections import Counter
from datetime import datetime, timedelta
from itertools import pairwise, product

import pytest
from conftest import run_data_stages
from support import naive, store

from kit.data.dedup import dedup
from kit.data.dedup.dedup import CLUSTER, clusters_at, components, deduplicate
from kit.data.engine.spark import session
from kit.lake.store import Lake
from kit.params import Cores, Deduplicate

P = Deduplicate()
WORDS = ["".join(x) for x in product("bcdfgklmnprstvz", "aeiou", "lmnrst")]


def verdicts(lake: Lake, run: str, docs: list[dict], parts: int = 1, **values) -> dict[str, dict]:
    """Store, deduplicate, and what became of each document."""
    store(lake, run, docs, parts)
    made = deduplicate(
        Deduplicate(**{"run": run, "lake": lake.uri, "cores": 2, "boilerplate_pages": 0} | values), lake
    )
    return {r["doc_id"]: r for r in lake.table(made).to_pylist()}


def text_of(pick: random.Random, n: int = 120) -> list[str]:
    return pick.choices(WORDS, k=n)


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
        assert r["jaccard"] == pytest.approx(true, abs=1e-6)
        assert r["reason"] != "near copy" or true >= P.min_jaccard
        assert (r["reason"] == "same text") <= (text[r["doc_id"]] == text[r["survivor"]])


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


@pytest.fixture
def lake(tmp_path) -> Lake:
    return Lake(str(tmp_path))


def test_a_chain_loses_only_what_is_near_the_one_that_stays(lake: Lake) -> None:
    words = text_of(random.Random(1), 140)
    texts = {x: " ".join(words[i : i + 100]) for x, i in zip("abc", (0, 12, 24), strict=True)}
    near, far = naive(texts["a"], texts["b"]), naive(texts["a"], texts["c"])
    assert near > 0.7 > 0.65 > far
    for best, kept in (("a", ["a", "c"]), ("b", ["b"])):
        docs = [{"doc_id": x, "text": t, "reviews": [{"item": "x"}] * (x == best)} for x, t in texts.items()]
        found = verdicts(lake, best, docs)
        assert [x for x in found if found[x]["keep"]] == kept
        assert {r["cluster_id"] for r in found.values()} == {"a"}
        assert all(
            r["jaccard"] == pytest.approx(naive(texts[x], texts[r["survivor"]])) for x, r in found.items()
        )


def test_exact_copies_go_by_their_name_and_can_be_switched_off(lake: Lake) -> None:
    pick = random.Random(2)
    one, other, third, fourth = (" ".join(text_of(pick)) for _ in range(4))
    docs = [
        {"doc_id": "a", "text": one, "url": "u", "fetch_time": datetime(2026, 1, 2)},
        {"doc_id": "b", "text": other, "url": "u"},
        {"doc_id": "c", "text": third, "payload_digest": "P"},
        {"doc_id": "d", "text": third + " " + fourth, "payload_digest": "P"},
        {"doc_id": "e", "text": fourth},
        {"doc_id": "f", "text": fourth},
        {"doc_id": "g", "text": fourth.upper()},
        {"doc_id": "h", "text": "!"},
        {"doc_id": "i", "text": "?"},
    ]
    found = verdicts(lake, "all", docs, survivor="latest")
    assert {x: (r["reason"], r["survivor"]) for x, r in found.items() if not r["keep"]} == {
        "b": ("same URL", "a"), "d": ("same payload", "c"), "f": ("same text", "e"), "g": ("near copy", "e")
    }  # fmt: skip
    assert found["b"]["jaccard"] < 0.1 and found["g"]["jaccard"] == 1
    assert not verdicts(lake, "earliest", docs, survivor="earliest")["a"]["keep"]
    assert not verdicts(lake, "longest", docs, survivor="longest")["c"]["keep"]
    off = verdicts(lake, "off", docs, exact=[])
    assert {x for x, r in off.items() if not r["keep"]} == {"f", "g"}


def test_thousand_equal_texts_and_a_crowd_of_near_ones_cost_little_and_lose_nothing(lake: Lake) -> None:
    """Buckets far above `ALL_PAIRS_UP_TO`: few pairs are compared, and still one text of each crowd stays."""
    pick = random.Random(3)
    same, base = " ".join(text_of(pick)), text_of(pick, 400)
    docs = [{"doc_id": f"s{i:03d}", "text": same + "." * (i % 2)} for i in range(1000)]
    docs += [{"doc_id": f"n{i:03d}", "text": " ".join([*base, WORDS[i]])} for i in range(300)]
    found = verdicts(lake, "crowd", docs, exact=[])
    assert sum(r["keep"] for r in found.values()) == 2
    compared = lake.need("crowd", "40_deduplicate").metrics["pairs_compared"]
    assert compared < 1000 + 300 * 60, compared


@pytest.mark.slow  # rounds are Spark SQL's
def test_clusters_are_the_same_by_one_task_and_by_rounds(lake: Lake, monkeypatch) -> None:
    pick = random.Random(4)
    words = text_of(pick, 1000)
    docs = [
        {"doc_id": f"{pick.random():.12f}", "text": " ".join(words[i : i + 80])} for i in range(0, 900, 8)
    ]
    one = verdicts(lake, "one", docs, 3)
    monkeypatch.setattr(dedup, "FEW_PAIRS", 0)
    assert verdicts(lake, "rounds", docs, 3) == one
    sizes = Counter(Counter(r["cluster_id"] for r in one.values()).values())
    assert 1 <= len({r["cluster_id"] for r in one.values()}) < len(docs) / 4
    pairs = lake.table(lake.need("one", "40_deduplicate"), "pairs")
    assert Counter(x for x in clusters_at(pairs, P.min_jaccard)) == {k: n for k, n in sizes.items() if k > 1}
    assert clusters_at(pairs, 0.999) == []


def test_components_of_a_long_chain_and_two_islands() -> None:
    spark = session(Cores(cores=2))
    edges = [*pairwise(range(100, 140)), (1, 2), (11, 13), (12, 13)]
    random.Random(3).shuffle(edges)
    found = components(spark.createDataFrame(edges, "a long, b long")).collect()
    wanted = dict.fromkeys(range(100, 140), 100) | {1: 1, 2: 1} | dict.fromkeys((11, 12, 13), 11)
    assert {r.doc: r.label for r in found} == wanted


def test_the_same_bytes_however_the_input_is_cut(lake: Lake, monkeypatch) -> None:
    """One and forty parts, shuffled, on one and two cores, in several groups: the same clusters, pairs and lines."""
    pick = random.Random(6)
    docs = []
    for i in range(400):
        text = text_of(pick, 100)
        for _ in range(pick.choice((1, 1, 2, 4))):
            words = [pick.choice(WORDS) if pick.random() < 0.03 else w for w in text]
            host, line = f"{i % 9}.example", "\nhome about contact"
            docs.append(
                {"doc_id": f"{pick.getrandbits(80):020x}", "text": " ".join(words) + line, "host": host}
            )
    monkeypatch.setattr(dedup, "LEAST_GROUP_BYTES", 10_000)
    made = set()
    for parts, cores in ((1, 2), (40, 2), (40, 1)):
        pick.shuffle(docs)
        run = f"{parts}on{cores}"
        verdicts(lake, run, docs, parts, cores=cores, boilerplate_pages=4)
        found = lake.need(run, "40_deduplicate")
        made.add((found.content_sha256, str(found.metrics), str(found.counts)))
    assert len(made) == 1
    assert found.counts.dropped["near copy"] > 50
    assert lake.table(found, "boilerplate").num_rows == 9
    close = lake.table(found, "pairs").to_pylist()
    text = {d["doc_id"]: d["text"] for d in docs}
    assert all(x["jaccard"] == pytest.approx(naive(text[x["a"]], text[x["b"]])) for x in close[:50])
    session(Cores(cores=2))


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
        assert one.metrics == two.metrics
    assert one.counts.dropped, "no copy in the slice: the comparison says little"


@pytest.mark.slow  # two corpora, the larger of 32,000 documents
def test_growth(tmp_path) -> None:
    """Eight times the documents: every planted copy is decided alike, and the time is told."""
    lake, seconds = Lake(str(tmp_path)), {}
    for n in (4000, 32000):
        pick, docs = random.Random(7), []
        for i in range(n // 2):
            text = text_of(pick, 300)
            start = datetime(2026, 1, 1) + timedelta(seconds=i)
            docs += [
                {"doc_id": f"{i:08d}-{k}", "text": " ".join([*text, *WORDS[:k]]), "fetch_time": start}
                for k in (0, 1)
            ]
        found = verdicts(lake, f"n{n}", docs, 8)
        assert Counter(r["reason"] for r in found.values()) == {None: n // 2, "near copy": n // 2}
        seconds[n] = lake.need(f"n{n}", "40_deduplicate").seconds
    print(f"4,000 documents {seconds[4000]:.1f} s, 32,000 {seconds[32000]:.1f} s")
