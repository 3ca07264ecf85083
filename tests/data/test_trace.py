"""The way back: from a row, a pair or a document to the bytes that hold its sentences."""

import re

import pytest

from kit.data.trace import trace
from kit.errors import LakeError
from kit.lake.store import Lake

HELD = re.compile(r"(\d+) of (\d+) sentences")


def rows(lake: Lake, stage: str, name: str) -> list[dict]:
    return lake.table(lake.need("sample", stage), name).to_pylist()


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_a_row_leads_to_bytes_that_hold_it(data_lake: Lake, refined: dict, split: str) -> None:
    by_id = {d["doc_id"]: d for d in refined.values()}
    for row in rows(data_lake, "50_build_datasets", split)[::25]:
        told = trace(data_lake, row["row_id"], ["sample"])
        doc = by_id[row["doc_id"]]
        for part in (
            doc["url"],
            doc["warc_filename"],
            f"offset {doc['warc_record_offset']}",
            "digest the same",
        ):
            assert part in told
        assert f"length {doc['warc_record_length']}" in told
        held, of = map(int, HELD.search(told).groups())
        assert held == of > 0, told


def test_documents_lead_to_bytes_that_hold_them(data_lake: Lake, refined: dict) -> None:
    for doc in [d for d in refined.values() if not d["repaired"]][::40]:
        told = trace(data_lake, doc["doc_id"], ["nowhere", "sample"])
        held, of = map(int, HELD.search(told).groups())
        assert held == of, told
        assert (f"dropped: {doc['drop_reason']}" if doc["drop_reason"] else "kept") in told


def test_a_pair_shows_both_sides(data_lake: Lake) -> None:
    pair = rows(data_lake, "50_build_datasets", "preferences")[0]
    told = trace(data_lake, pair["pair_id"], ["sample"])
    assert pair["item"] in told
    assert told.index(pair["chosen_row"]) < told.index(pair["rejected_row"])
    assert told.count("offset") == 2


def test_an_unknown_id_is_one_clear_line(data_lake: Lake) -> None:
    with pytest.raises(LakeError, match="no row, pair or document 'x1'"):
        trace(data_lake, "x1", ["sample"])
    with pytest.raises(LakeError, match="no run"):
        trace(data_lake, "x1", [])


def test_which_copy_stays_and_why(data_lake: Lake) -> None:
    decided = data_lake.table(data_lake.need("sample", "40_deduplicate")).to_pylist()
    gone = next(d for d in decided if d["reason"] == "near copy")
    alone = next(d for d in decided if not any(d["doc_id"] == x["survivor"] for x in decided if x is not d))
    told = {d["doc_id"]: trace(data_lake, d["doc_id"], ["sample"]) for d in (gone, alone)}
    assert f"goes, near copy of {gone['survivor']} (Jaccard {gone['jaccard']:.2f})" in told[gone["doc_id"]]
    stays = sum(d["survivor"] == gone["survivor"] for d in decided) - 1
    assert f"stays by the rule 'richest', {stays} go" in trace(data_lake, gone["survivor"], ["sample"])
    assert "dedup     no copies" in told[alone["doc_id"]]
