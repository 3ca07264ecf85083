"""Training rows: every document accounted for, no subject on both sides, pairs that readers made."""

import json
from collections import Counter

import pytest

from kit.data.datasets import build_datasets, build_rows, heldout_groups, preference_pairs
from kit.lake import Lake, LakeError
from kit.params import BuildDatasets, ParamError

P = BuildDatasets()


def review(
    item: str, body: str, helpful: int | None = None, votes: int | None = None, kind: str = "Movie"
) -> dict:
    return {"item": item, "item_type": kind, "rating": 3.0, "body": body, "helpful": helpful, "votes": votes}


def document(number: int, reviews: list[dict] | None = None, **values) -> dict:
    """A document that refining and deduplication kept."""
    return {
        "doc_id": f"doc{number}",
        "host": f"site{number}.example",
        "lang": "en",
        "text": f"Text number {number}.",
        "reviews": reviews or [],
        "cluster_id": f"doc{number}",
    } | values


def films(count: int) -> list[dict]:
    """One document a film, each with two reviews of it."""
    return [
        document(i, [review(f"Film {i}", f"Body {i}{x}", h, 10) for x, h in (("a", 9), ("b", 2))])
        for i in range(count)
    ]


def sides(rows: list[dict]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {"train": set(), "heldout": set()}
    for row in rows:
        found[row["split"]].add(row["group"])
    return found


def test_the_sample_has_no_subject_on_both_sides(data_lake: Lake) -> None:
    manifest = data_lake.need("sample", "50_build_datasets")
    train, heldout = (data_lake.table(manifest, f"{s}.parquet").to_pylist() for s in ("train", "heldout"))
    assert len(train) > 4 * len(heldout) > 40
    assert not {r["group"] for r in train} & {r["group"] for r in heldout}
    assert not {r["completion"] for r in train} & {r["completion"] for r in heldout}
    assert not {r["doc_id"] for r in train} & {r["doc_id"] for r in heldout}
    counts = Counter(r["row_id"] for r in train + heldout)
    assert set(counts.values()) == {1}
    assert manifest.counts.records_out == len(counts)


def test_the_sample_pairs_are_about_one_film_and_clearly_apart(data_lake: Lake) -> None:
    manifest = data_lake.need("sample", "50_build_datasets")
    rows = {
        r["row_id"]: r | {"split": s}
        for s in ("train", "heldout")
        for r in data_lake.table(manifest, f"{s}.parquet").to_pylist()
    }
    pairs = data_lake.table(manifest, "preferences.parquet").to_pylist()
    assert len(pairs) > 100
    for pair in pairs:
        better, worse = rows[pair["chosen_row"]], rows[pair["rejected_row"]]
        assert better["group"] == worse["group"]
        assert better["split"] == worse["split"] == pair["split"]
        assert pair["prompt"] == better["prompt"] == worse["prompt"]
        assert (pair["chosen"], pair["rejected"]) == (better["completion"], worse["completion"])
        assert pair["chosen_helpful"] - pair["rejected_helpful"] >= P.min_helpful_gap - 1e-6


def test_json_lines_and_parquet_say_the_same(data_lake: Lake) -> None:
    manifest = data_lake.need("sample", "50_build_datasets")

    def lines(name: str) -> list[dict]:
        (path,) = data_lake.paths(manifest, f"{name}.jsonl")
        return [json.loads(x) for x in data_lake.fs.cat_file(path).decode().split("\n")[:-1]]

    for split in ("train", "heldout"):
        rows = data_lake.table(manifest, f"{split}.parquet").to_pylist()
        wanted = [
            {"text": r["prompt"] + r["completion"], "row_id": r["row_id"], "doc_id": r["doc_id"]}
            for r in rows
        ]
        assert lines(split) == wanted
    told = [{k: v for k, v in x.items() if "helpful" not in k} for x in lines("preferences")]
    table = data_lake.table(manifest, "preferences.parquet")
    assert told == [{k: x[k] for k in told[0]} for x in table.to_pylist()]


def test_documents_rows_and_reasons_add_up() -> None:
    docs = [
        *films(6),
        document(90),
        document(91, [review("Saw", "x", kind="Product")]),
        document(92, lang="de"),
    ]
    docs.append(document(93, [review("Film 0", "Body 0a"), review("", "no subject")]))
    rows, counts = build_rows(docs, P)
    assert (counts.records_in, counts.created, counts.records_out) == (10, 6, 12)
    assert counts.dropped == {
        "language not in train_languages": 1,
        "no review of item_types": 2,
        "row already there": 1,
    }
    assert rows[0]["prompt"] == "The review of movie 'Film 0' is"
    assert rows[0]["completion"] == " Body 0a"


def test_without_reviews_documents_are_rows_and_a_site_or_cluster_is_one_group() -> None:
    docs = [document(i) for i in range(20)]
    docs += [
        document(20, host="site3.example"),
        document(21, cluster_id="doc3"),
        document(22, cluster_id="doc20"),
    ]
    docs[20]["cluster_id"] = "doc20"
    rows, counts = build_rows(docs, P)
    assert counts.records_out == counts.records_in == 23
    assert {r["kind"] for r in rows} == {"document"}
    groups = {r["doc_id"]: r["group"] for r in rows}
    assert len({groups[f"doc{i}"] for i in (3, 20, 21, 22)}) == 1
    assert len(set(groups.values())) == 20
    found = sides(rows)
    assert found["train"] and found["heldout"] and not found["train"] & found["heldout"]
    assert build_rows(films(6), BuildDatasets(prefer_reviews=False))[0][0]["kind"] == "document"


def test_one_group_cannot_be_held_out_without_a_leak() -> None:
    with pytest.raises(LakeError, match="hold out"):
        build_rows([document(1, [review("Fog", "a"), review("fog", "b")])], P)
    with pytest.raises(LakeError, match="train_languages"):
        build_rows([document(1, lang="de")], P)


@pytest.mark.parametrize("share", [0.05, 0.15, 0.9])
def test_held_out_groups_stay_when_data_are_added(share: float) -> None:
    groups = [f"film {i}" for i in range(400)]
    few, many = (heldout_groups(set(groups[:n]), share, 0) for n in (200, 400))
    assert few == many & set(groups[:200])
    assert len(many) / 400 == pytest.approx(share, abs=0.06)
    assert heldout_groups(set(groups), share, 1) != many
    assert len(heldout_groups({"a", "b"}, share, 0)) == 1


def test_a_pair_needs_votes_and_a_gap_and_one_subject() -> None:
    bodies = [("best", 9, 10), ("good", 8, 10), ("bad", 1, 10), ("few votes", 0, 4), ("no votes", None, None)]
    rows, _ = build_rows([document(1, [review("Fog", *b) for b in bodies]), *films(3)], P)
    pairs = list(preference_pairs([r for r in rows if r["group"] == "fog"], P))
    assert [(x["chosen"], x["rejected"]) for x in pairs] == [(" best", " bad"), (" good", " bad")]
    assert len(list(preference_pairs(rows, P))) == 2 + 3


def test_the_same_documents_make_the_same_rows_in_any_order() -> None:
    docs = films(8)
    first, again = (build_rows(d, P)[0] for d in (docs, docs[::-1]))
    assert sorted(first, key=str) == sorted(again, key=str)


@pytest.mark.parametrize("template", ["{film} is", "{", "{0}", "{item.x}"])
def test_a_template_that_cannot_be_filled_in_is_named(data_lake: Lake, template: str) -> None:
    with pytest.raises(ParamError, match="prompt_template"):
        build_datasets(BuildDatasets(lake=data_lake.uri, prompt_template=template), data_lake)
