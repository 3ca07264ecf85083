"""Files that arrive: event shapes, none lost and none twice, poison, replay; on a disk, on a real S3 server, at once."""

import base64
import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from urllib.parse import quote_plus

import psutil
import pyarrow.parquet as pq
import pytest
from conftest import CRAWL, SAMPLE

from kit.data.read import archive
from kit.data.trace import trace
from kit.errors import EventError, LakeError
from kit.lake.store import Lake
from kit.launch.arrival import event as event_module
from kit.launch.arrival import landed, on_arrival
from kit.launch.arrival.on_arrival import commits, handle, handler, put_file, read_manifest, zone
from kit.launch.arrival.watch import event_of, linked_images, outcomes, refine_on_arrival, watch
from kit.params import RefineOnArrival

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


@pytest.fixture(scope="module")
def warc() -> bytes:
    """One archive of the sample crawl."""
    return sorted((SAMPLE / "crawl-data" / CRAWL).rglob("warc/*.warc.gz"))[0].read_bytes()


@pytest.fixture(scope="module")
def pages(warc: bytes, tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Its HTML pages that say where they are from."""
    path = tmp_path_factory.mktemp("warc") / "a.warc.gz"
    path.write_bytes(warc)
    found = (
        r.page(1 << 22).payload
        for r in archive.records(str(path))
        if r.type == "response" and r.status == 200
    )
    return [page for page in found if b'rel="canonical"' in page]


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return Lake(str(tmp_path / "my lake"))


def params(lake: Lake, **values) -> RefineOnArrival:
    return RefineOnArrival(lake=lake.uri, run="r", **{"workers": 2} | values)


def record(bucket: str, key: str, sequencer: str = "0A1B2C3D4E5F678901", **more) -> dict:
    """A record as S3 writes it; `key` is not encoded yet."""
    return {
        "eventVersion": "2.1",
        "eventSource": "aws:s3",
        "awsRegion": "us-east-1",
        "eventTime": "2026-02-03T04:05:06.789Z",
        "eventName": "ObjectCreated:Put",
        "userIdentity": {"principalId": "AWS:AIDAEXAMPLE"},
        "requestParameters": {"sourceIPAddress": "192.0.2.1"},
        "responseElements": {"x-amz-request-id": "C3D13FE58DE4C810", "x-amz-id-2": "FMyUVURIY8/IgAtTv8xRjskZ"},
        "s3": {
            "s3SchemaVersion": "1.0",
            "configurationId": "drop-zone",
            "bucket": {"name": bucket, "ownerIdentity": {"principalId": "A3NL"}, "arn": f"arn:aws:s3:::{bucket}"},
            "object": {"key": quote_plus(key, safe="/"), "size": 1024, "eTag": "d41d8cd98f00b204e9800998ecf8427e",
                       "sequencer": sequencer} | more,
        },
    }  # fmt: skip


def event(lake: Lake, name: str, sequencer: str = "0A") -> dict:
    return {"Records": [record(lake.root, name, sequencer)]}


def message(number: int, body: object) -> dict:
    """A message as SQS hands it to Lambda."""
    return {
        "messageId": f"m-{number}",
        "receiptHandle": "AQEBwJnKyrHigUMZj6rYigCgxlaS3SLy0a",
        "body": body if isinstance(body, str) else json.dumps(body),
        "attributes": {"ApproximateReceiveCount": "1"},
        "messageAttributes": {},
        "md5OfBody": "e4e68fb7bd0e697a0ae8f1bb342846b3",
        "eventSource": "aws:sqs",
        "eventSourceARN": "arn:aws:sqs:us-east-1:123456789012:drops",
        "awsRegion": "us-east-1",
    }


def chain(lake: Lake, p: RefineOnArrival, name: str, sequencer: str = "0A") -> dict:
    """A file through both steps, each started by its own event; the last result."""
    (result,) = handle(event(lake, name, sequencer), p, lake)["results"]
    if "commit" in result:
        (result,) = handle(event(lake, result["commit"]), p, lake)["results"]
    return result


def refined(lake: Lake, result: dict) -> list[dict]:
    (output,) = read_manifest(lake, result["commit"]).outputs
    return pq.read_table(f"{lake.root}/{output.name}", filesystem=lake.fs, partitioning=None).to_pylist()


def files(lake: Lake) -> dict[str, bytes]:
    return {f: lake.fs.cat_file(f) for f in lake.fs.find(lake.root)}


# --- events

S3 = {"Records": [record("lake", "a/raw/r/x y+z.html", versionId="096fKKXTRTtl3on89fVO.nfljtsv6qko")]}
SNS = {
    "Type": "Notification",
    "MessageId": "1",
    "TopicArn": "arn:aws:sns:us-east-1:1:t",
    "Message": json.dumps(S3),
}
BRIDGE = {
    "version": "0",
    "id": "17793124-05d4-b198-2fde-7ededc63b103",
    "detail-type": "Object Created",
    "source": "aws.s3",
    "account": "123456789012",
    "time": "2026-02-03T04:05:06Z",
    "region": "us-east-1",
    "resources": ["arn:aws:s3:::lake"],
    "detail": {
        "version": "0",
        "bucket": {"name": "lake"},
        "object": {"key": "a/raw/r/x y+z.html", "size": 5, "etag": "b1946ac92492d2347c6235b4d2611184",
                   "version-id": "096fKKXTRTtl3on89fVO.nfljtsv6qko", "sequencer": "0A1B2C3D4E5F678901"},
        "reason": "PutObject",
    },
}  # fmt: skip


@pytest.mark.parametrize(
    "shape",
    [S3, {"Records": [message(1, S3)]}, {"Records": [message(1, SNS)]}, BRIDGE, {"Records": [message(1, BRIDGE)]},
     {"Records": [{"EventSource": "aws:sns", "Sns": {"Message": json.dumps(S3)}}]}],
    ids=["s3", "sqs", "sns-sqs", "eventbridge", "eventbridge-sqs", "sns"],
)  # fmt: skip
def test_every_wrapping_holds_the_same_object(shape: dict) -> None:
    (x,) = event_module.landed(shape)
    assert x.path == "lake/a/raw/r/x y+z.html" and x.version == "096fKKXTRTtl3on89fVO.nfljtsv6qko"
    assert x.sequencer == "0a1b2c3d4e5f678901".ljust(32, "0") and x.time.startswith("2026-02-03T04:05:06")


def test_a_batch_holds_all_its_objects_and_what_is_no_creation_is_left_out() -> None:
    gone = record("lake", "b") | {"eventName": "ObjectRemoved:Delete"}
    copied = record("lake", "c") | {"eventName": "s3:ObjectCreated:CompleteMultipartUpload"}
    assert [x.path for x in event_module.landed({"Records": [record("lake", "a"), gone, copied]})] == [
        "lake/a",
        "lake/c",
    ]
    assert event_module.landed({"Service": "Amazon S3", "Event": "s3:TestEvent", "Bucket": "lake"}) == []
    assert event_module.landed(BRIDGE | {"detail-type": "Object Deleted"}) == []


@pytest.mark.parametrize(
    "bad", [{}, {"Records": [{}]}, {"Records": [message(1, "{")]}, {"Records": [message(1, "[]")]}]
)
def test_what_is_no_s3_event_is_said(bad: dict) -> None:
    with pytest.raises(EventError, match="no S3 event"):
        event_module.landed(bad)


def test_the_longer_sequencer_is_not_always_the_later() -> None:
    orders = [
        event_module.landed({"Records": [record("b", "k", s)]})[0].sequencer
        for s in ("0055AED6DC", "0055AED6DCD902")
    ]
    other = event_module.landed({"Records": [record("b", "k", "0055AED7")]})[0].sequencer
    assert orders[0] < orders[1] < other


def test_of_a_queue_only_the_failed_message_comes_back(lake: Lake, pages: list[bytes]) -> None:
    p = params(lake)
    for i in (1, 2):
        put_file(lake, f"raw/r/{i}.html", pages[i])
    bodies = [
        event(lake, "raw/r/1.html"),
        {"what": "is this"},
        event(lake, "raw/r/2.html"),
        {"Event": "s3:TestEvent"},
    ]
    told = handle({"Records": [message(i, body) for i, body in enumerate(bodies)]}, p, lake)
    assert told == {"batchItemFailures": [{"itemIdentifier": "m-1"}]}
    assert len(commits(lake, zone(p, "extracted"))) == 2


def test_a_store_that_fails_is_no_poison(
    lake: Lake, pages: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    p = params(lake)
    for name in ("a", "b"):
        put_file(lake, f"raw/r/{name}.html", pages[0])
    info = lake.fs.info

    def broken(path: str, **more):
        if path.endswith("a.html"):
            raise TimeoutError("the store does not answer")
        return info(path, **more)

    monkeypatch.setattr(lake.fs, "info", broken)
    both = {"Records": [record(lake.root, f"raw/r/{name}.html") for name in ("a", "b")]}
    with pytest.raises(LakeError, match="does not answer"):
        handle(both, p, lake)
    monkeypatch.undo()
    assert [r["status"] for r in handle(both, p, lake)["results"]] == ["extracted", "duplicate"]


def test_the_lambda_entry_point_has_its_parameters_from_the_environment(lake, pages, monkeypatch) -> None:
    monkeypatch.setenv("KIT_PARAMS", json.dumps({"run": "r", "lake": lake.uri, "min_words": 20}))
    put_file(lake, "raw/r/a.html", pages[0])
    (result,) = handler(event(lake, "raw/r/a.html"), None)["results"]
    assert result["status"] == "extracted" and read_manifest(lake, result["commit"]).params["min_words"] == 20


# --- none lost, none twice


def test_duplicates_change_nothing(lake: Lake, pages: list[bytes]) -> None:
    p = params(lake)
    put_file(lake, "raw/r/a b+c.html", pages[0])
    first = chain(lake, p, "raw/r/a b+c.html")
    before = files(lake)
    assert chain(lake, p, "raw/r/a b+c.html")["status"] == "duplicate"
    assert (
        handle(event(lake, outcomes(p, lake)[0]["extracted"]), p, lake)["results"][0]["status"] == "duplicate"
    )
    assert files(lake) == before and len(refined(lake, first)) == 1


def test_a_retry_after_a_lost_manifest_makes_the_same(lake: Lake, pages: list[bytes]) -> None:
    p = params(lake)
    put_file(lake, "raw/r/a.html", pages[0])
    done = chain(lake, p, "raw/r/a.html")
    parts = {k: v for k, v in files(lake).items() if k.endswith(".parquet")}
    lake.fs.rm_file(f"{lake.root}/{done['commit']}")  # as if it had been killed before the commit
    assert [r["status"] for r in outcomes(p, lake)] == ["waiting"]
    assert handle(event(lake, outcomes(p, lake)[0]["extracted"]), p, lake)["results"][0] == done
    assert {k: v for k, v in files(lake).items() if k.endswith(".parquet")} == parts


@pytest.mark.parametrize("raced", [False, True])
def test_an_older_version_that_comes_late_does_not_win(lake, pages, monkeypatch, raced: bool) -> None:
    p = params(lake)
    put_file(lake, "raw/r/a.html", pages[1])
    new = chain(lake, p, "raw/r/a.html", "0B")
    put_file(
        lake, "raw/r/a.html", pages[0]
    )  # what a store with versions would still give for the older event
    if raced:  # neither of two saw the other
        monkeypatch.setattr(on_arrival, "_settled", lambda *_: "")
    late = chain(lake, p, "raw/r/a.html", "0A")
    assert late["status"] == ("refined" if raced else "older")
    (row,) = outcomes(p, lake)
    assert row["refined"] == new["commit"]


def test_a_newer_version_takes_the_place_of_the_older(lake: Lake, pages: list[bytes]) -> None:
    p = params(lake)
    for content, order in ((pages[0], "0A"), (pages[1], "0A01"), (pages[0], "0B")):
        put_file(lake, "raw/r/a.html", content)
        last = chain(lake, p, "raw/r/a.html", order)
        (row,) = outcomes(p, lake)
        assert row["refined"] == last["commit"] and row["documents"] == 1
    assert len(commits(lake, zone(p, "refined"))) == 3, "each intermediate is kept"


def test_names_that_are_nobodys_business(lake: Lake, pages: list[bytes]) -> None:
    p = params(lake)
    names = ["raw/other/a.html", "raw/r/.a.html", "raw/r/_tmp/a.html", "raw/r/../r/a.html", "raw/r/folder/", "else/a.html",
             f"{zone(p, 'extracted')}/x/y.parquet", f"{zone(p, 'refined')}/x/y.json"]  # fmt: skip
    for name in names:
        assert handle(event(lake, name), p, lake)["results"] == [{"path": name, "status": "ignored"}]
    assert handle(event(lake, "raw/r/never.html"), p, lake)["results"][0]["status"] == "gone"
    assert not lake.fs.find(lake.root)


# --- replay


def test_another_threshold_starts_from_the_intermediate(lake, pages, monkeypatch) -> None:
    p = params(lake)
    put_file(lake, "raw/r/a.html", pages[0])
    kept = chain(lake, p, "raw/r/a.html")
    monkeypatch.setattr(on_arrival, "documents_of", lambda *_: pytest.fail("extracted again"))
    strict = params(lake, min_words=5000)
    assert [r["status"] for r in outcomes(strict, lake)] == ["waiting"]
    again = handle(event(lake, outcomes(strict, lake)[0]["extracted"]), strict, lake)["results"][0]
    assert again["status"] == "refined" and again["commit"] != kept["commit"]
    assert [r["kept"] for x in (p, strict) for r in outcomes(x, lake)] == [1, 0]
    assert "words" in refined(lake, again)[0]["drop_reason"]


def test_a_prefilter_asks_for_no_more_words_than_the_rule_does(lake: Lake) -> None:
    put_file(
        lake,
        "raw/r/a.html",
        b"<p>These few words are enough for whoever moved the bound of the rule to five.</p>",
    )
    strict, moved = (
        params(lake, prefilter=True, thresholds=bounds) for bounds in ([], ["gopher_quality: words >= 5"])
    )
    (dropped,) = handle(event(lake, "raw/r/a.html"), strict, lake)["results"]
    assert read_manifest(lake, dropped["commit"]).counts.dropped == {"prefilter: words": 1}
    # another bound is another step 1, so the same version of the file is no duplicate
    kept = chain(lake, moved, "raw/r/a.html")
    assert "gopher_quality: words" not in refined(lake, kept)[0]["failed_rules"]


def test_another_extractor_starts_from_the_file(lake: Lake, pages: list[bytes]) -> None:
    put_file(lake, "raw/r/a.html", pages[0])
    results = [chain(lake, params(lake, extractor=name), "raw/r/a.html") for name in ("auto", "resiliparse")]
    assert [refined(lake, r)[0]["extractor"] for r in results] == ["auto", "resiliparse"]


def test_a_failed_step_is_done_again_alone(lake, pages, monkeypatch) -> None:
    p = params(lake)
    put_file(lake, "raw/r/a.html", pages[0])
    (first,) = handle(event(lake, "raw/r/a.html"), p, lake)["results"]
    before = files(lake)
    monkeypatch.setattr(on_arrival, "refine_batch", lambda *_: 1 / 0)
    with pytest.raises(Exception, match="division by zero"):
        handle(event(lake, first["commit"]), p, lake)
    assert files(lake) == before
    monkeypatch.undo()
    assert handle(event(lake, first["commit"]), p, lake)["results"][0]["status"] == "refined"


def test_a_damaged_intermediate_is_refused(lake: Lake, pages: list[bytes]) -> None:
    p = params(lake)
    put_file(lake, "raw/r/a.html", pages[0])
    (first,) = handle(event(lake, "raw/r/a.html"), p, lake)["results"]
    (output,) = read_manifest(lake, first["commit"]).outputs
    lake.fs.pipe_file(f"{lake.root}/{output.name}", b"PAR1 something else")
    with pytest.raises(LakeError, match="not what its manifest says"):
        handle(event(lake, first["commit"]), p, lake)


# --- kinds of files


def test_an_archive_gives_the_documents_the_batch_chain_gives(
    lake: Lake, warc: bytes, tmp_path: Path
) -> None:
    from kit.data.extract.extract import extract_rows
    from kit.data.select.index import Index
    from kit.params import ExploreIndex

    (tmp_path / "a.warc.gz").write_bytes(warc)
    index = Index(ExploreIndex(archive_paths=[str(tmp_path / "a.warc.gz")]))
    batch, _ = extract_rows(str(tmp_path), index.select().to_pylist(), params(lake))
    put_file(lake, "raw/r/a.warc.gz", warc)
    (result,) = handle(event(lake, "raw/r/a.warc.gz"), params(lake), lake)["results"]
    mine = refined(lake, result)
    same = ("url", "text", "warc_record_offset", "warc_record_length", "payload_digest")
    assert [[d[k] for k in same] for d in mine] == [[d[k] for k in same] for d in batch.to_pylist()]
    assert len({d["doc_id"] for d in mine}) == len(mine) > 50
    counts = read_manifest(lake, result["commit"]).counts
    assert counts.records_in == index.rows + len(index.damage) and counts.dropped["record type request"] > 50


def test_json_in_every_form_leads_back_to_its_bytes(lake: Lake) -> None:
    texts = [f"Number {i}: “quotes”, ü, 語, \U0001f600" for i in range(3)]
    rows = [{"text": t, "url": f"https://x.example/{i}"} for i, t in enumerate(texts)]
    forms = {
        "lines.jsonl": "\r\n".join(json.dumps(r, ensure_ascii=False) for r in rows),
        "list.json": json.dumps(rows, indent=2),
        "one.json": "\ufeff" + json.dumps(rows[0]),
        "wrong.txt": "\n".join(map(json.dumps, rows)),
    }
    for name, content in forms.items():
        put_file(lake, f"raw/r/{name}", content.encode())
        documents = refined(lake, handle(event(lake, f"raw/r/{name}"), params(lake), lake)["results"][0])
        assert [d["text"] for d in documents] == texts[: len(documents)] and len(documents) == (
            1 if "one" in name else 3
        )
        for d in documents:
            start = d["warc_record_offset"]
            found = json.loads(content.encode()[start : start + d["warc_record_length"]])
            assert found["text"] == d["text"] and found["url"] == d["url"]
    assert [type(x[2]).__name__ for x in landed.json_texts(b'{"text": 1}\n{"text": bad}\n[1, {"a": 2}]')] == [
        "RecordError"
    ] * 4


def test_half_a_file_is_better_than_none(lake: Lake) -> None:
    content = b'{"text": "good \\ud800 half"}\n{"text": bro\x00ken}\n{"other": 1}\n\xff\xfe{"text": "again"}'
    put_file(lake, "raw/r/a.jsonl", content)
    (result,) = handle(event(lake, "raw/r/a.jsonl"), params(lake), lake)["results"]
    counts = read_manifest(lake, result["commit"]).counts
    assert result["status"] == "extracted" and counts.records_out == 1
    assert counts.failed == {"JSON without text": 1, "not JSON": 2}


def test_a_page_is_known_by_its_canonical_url_and_a_file_by_its_place(lake: Lake) -> None:
    body = "<p>Something to read for everybody who comes along here.</p>"
    put_file(lake, "raw/r/a.html", f"<link href='https://x.example/ü?a=1' rel=canonical>{body}".encode())
    put_file(lake, "raw/r/b.html", f"<meta content='http://y.example/' property='og:url'>{body}".encode())
    put_file(lake, "raw/r/ü c.html", f"<link rel=canonical href='javascript:alert(1)'>{body}".encode())
    put_file(lake, "raw/r/d.bin", ("\ufeff" + "Nur Text, sonst nichts. " * 9).encode("utf-16"))
    urls = [
        "https://x.example/%C3%BC?a=1",
        "http://y.example/",
        "lake:///raw/r/%C3%BC%20c.html",
        "lake:///raw/r/d.bin",
    ]
    for name, url in zip(("a.html", "b.html", "ü c.html", "d.bin"), urls, strict=True):
        (d,) = refined(lake, handle(event(lake, f"raw/r/{name}"), params(lake), lake)["results"][0])
        assert (d["url"], d["warc_filename"], d["warc_record_offset"]) == (url, f"raw/r/{name}", 0)


def test_the_place_of_the_lake_decides_nothing(tmp_path: Path, pages: list[bytes]) -> None:
    made = []
    for where in ("one", "two"):
        there = Lake(str(tmp_path / where))
        put_file(there, "raw/r/a.html", pages[0])
        made.append(refined(there, chain(there, params(there), "raw/r/a.html")))
    assert made[0] == made[1]


@pytest.mark.parametrize("order", [["p/page.html", "p/img/a b.png"], ["p/img/a b.png", "p/page.html"]])
def test_an_image_meets_its_page_whichever_comes_first(lake: Lake, order: list[str]) -> None:
    p = params(lake, quality_rules=[], min_lang_score=0)
    text = "<p>The bridge was closed for the winter, and nobody knew when it would be open again.</p>"
    page = f"<title>T</title>{text}<figure><img src='img/a%20b.png' alt='A bridge'><figcaption>Call 555-0100, mail me@x.example</figcaption></figure>{text}"
    content = {"p/page.html": page.encode(), "p/img/a b.png": PNG}
    for name in order:
        put_file(lake, f"raw/r/{name}", content[name])
        chain(lake, p, f"raw/r/{name}")
    rows = outcomes(p, lake)
    assert [(r["kind"], r["status"]) for r in rows] == [("image", "image"), ("html", "refined")]
    documents = pq.read_table(f"{lake.root}/{read_manifest(lake, rows[1]['refined']).outputs[0].name}")
    (link,) = linked_images(p, documents, rows)
    assert (
        link["image"] == "raw/r/p/img/a b.png"
        and link["alt"] == "A bridge"
        and "closed for the winter" in link["context"]
    )
    assert "<EMAIL>" in link["caption"] and "me@" not in link["caption"], "masked like all text"


# --- poison

BIG = 40_000_000
POISON = {
    "empty.html": (b"", "empty file"),
    "blank.txt": (b" \n\t" * 50, None),
    "garbage.warc.gz": (b"\x1f\x8b\x08" + bytes(range(256)) * 40, None),
    "text.warc": (b"this is no archive\n" * 9, "no record head"),
    "zeros.dat": (bytes(100_000), "not text"),
    "bomb.warc.gz": (gzip.compress(bytes(5 * BIG), 9), "no record head"),
    "line.txt": (b"x" * BIG, "record too large"),
    "line.html": (b"<html><p>" + b"x" * BIG, "record too large"),
    "line.json": (b'{"text": "' + b"x" * BIG, "not JSON"),
    "brackets.json": (b"[" * 1_000_000, "no record in file"),
    "deep.json": (b'{"a":' * 100_000, "not JSON"),
    "surrogates.json": (b'{"text": "\\udc00\\ud800"}', None),
    "picture.html": (b"%PDF-1.7" + bytes(3000), None),
    "tags.html": (b"<div>" * 10_000 + b"x" + b"</div>" * 10_000, None),
    "killer.html": (b"<p>" + b"a@" * 500_000, None),
    "killer.txt": (b"1.2.3.4 " * 20_000 + b"-" * 840_000, None),
}


@pytest.mark.parametrize("name", POISON)
def test_poison_has_a_reason_and_stops_nobody(lake: Lake, name: str, pages: list[bytes]) -> None:
    p, (content, reason) = (
        params(lake, page_timeout_s=10, file_timeout_s=20, page_memory_mb=500),
        POISON[name],
    )
    put_file(lake, f"raw/r/bad/{name}", content)
    put_file(lake, "raw/r/good.html", pages[0])
    both = {"Records": [record(lake.root, f"raw/r/{x}") for x in (f"bad/{name}", "good.html")]}
    bad, good = handle(both, p, lake)["results"]
    manifest = read_manifest(lake, bad["commit"])
    for x in (bad, good):
        assert handle(event(lake, x["commit"]), p, lake)["results"][0]["status"] in ("refined", "ignored")
    assert good["status"] == "extracted" and lake.fs.cat_file(f"{lake.root}/raw/r/bad/{name}") == content
    if reason:
        assert bad["status"] == "quarantined" and manifest.counts.failed == {reason: 1}
    note = f"{lake.root}/raw/r/_quarantine/bad/{name}.reason.json"
    assert lake.fs.exists(note) == (bad["status"] == "quarantined")
    if bad["status"] == "quarantined":
        told = json.loads(lake.fs.cat_file(note))
        assert told["reason"] == manifest.metrics["quarantine"] and told["path"] == f"raw/r/bad/{name}"
        assert lake.fs.cat_file(note.removesuffix(".reason.json")) == content
    else:
        (row,) = (r for r in outcomes(p, lake) if "bad" in r["path"])
        assert row["why"] and not row["kept"], "nothing goes without a reason"


def test_a_file_that_takes_too_long_or_too_much_is_given_up(
    lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_file(lake, "raw/r/a.txt", b"some text" * 99)
    ways = {"timeout": lambda *_: time.sleep(60), "out of memory": lambda *_: bytearray(900 << 20),
            "crash (signal 10)": lambda *_: os.kill(os.getpid(), 10), "cannot be opened: KeyError": {}.__getitem__}  # fmt: skip
    for i, (reason, way) in enumerate(ways.items()):
        monkeypatch.setattr(landed, "kind_of", lambda name, start, way=way: way(name))
        p = params(lake, file_timeout_s=0.5 if i == 0 else 20, page_memory_mb=300)
        (result,) = handle(event(lake, "raw/r/a.txt", f"0{i}"), p, lake)["results"]
        assert read_manifest(lake, result["commit"]).counts.failed == {reason: 1}
    big = params(lake, max_file_mb=0.0001)
    (result,) = handle(event(lake, "raw/r/a.txt", "0F"), big, lake)["results"]
    assert read_manifest(lake, result["commit"]).counts.failed == {"file too large": 1}


def test_a_document_that_breaks_the_refiner_costs_itself(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    p, refine = params(lake, page_timeout_s=1), on_arrival.refine_batch
    put_file(lake, "raw/r/a.jsonl", b"".join(b'{"text": "document %d"}\n' % i for i in range(4)))

    def slow(table, p):
        return time.sleep(60) if "document 2" in table["text"][0].as_py() else refine(table, p)

    monkeypatch.setattr(on_arrival, "refine_batch", slow)
    result = chain(lake, p, "raw/r/a.jsonl")
    counts = read_manifest(lake, result["commit"]).counts
    assert counts.failed == {"timeout": 1} and len(refined(lake, result)) == 3


# --- many at once, watched


def drop_and_watch(lake: Lake, p: RefineOnArrival, content: dict[str, bytes], during=lambda: None) -> Counter:
    """Everything written into the drop zone at once, half of it before the watch begins; statuses told."""
    names = sorted(content)
    before = names[: len(names) // 2]

    def drop(some: list[str]) -> None:
        for name in some:
            path = Path(lake.root, "raw/r", name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content[name])  # not at once, as people copy

    drop(before)
    told, left = Counter(), {f"raw/r/{n}" for n in names}
    results = watch(p, lake, lambda: (drop(names[len(before) :]), during()), quiet_s=20)
    for result in results:
        told[result["status"]] += 1
        if result["status"] in ("refined", "quarantined", "error"):
            left.discard(result["path"])
        if not left:
            break
    results.close()
    return told


def none_lost_none_twice(lake: Lake, p: RefineOnArrival, content: dict[str, bytes]) -> None:
    rows = outcomes(p, lake)
    assert [r["path"] for r in rows] == sorted(f"raw/r/{name}" for name in content)
    assert {r["status"] for r in rows} == {"refined", "quarantined"}
    outputs = [read_manifest(lake, r["refined"]).outputs[0].name for r in rows if r["refined"]]
    ids = [i for o in outputs for i in pq.read_table(f"{lake.root}/{o}")["doc_id"].to_pylist()]
    assert len(ids) == len(set(ids)) == sum(not name.startswith("bad") for name in content)


def many(pages: list[bytes], n: int) -> dict[str, bytes]:
    content = {f"{i % 7}/page {i}.html": pages[i % len(pages)] + b"<!-- %d -->" % i for i in range(n)}
    return content | {f"bad/{i}.warc.gz": b"\x1f\x8b\x08" + bytes(99) for i in range(n // 20)}


def kill_a_worker() -> None:
    time.sleep(0.5)
    for server in psutil.Process().children():
        if "forkserver" in " ".join(server.cmdline()) and (workers := server.children()):
            workers[0].kill()
            return
    pytest.fail("no worker found")


def test_many_files_at_once_and_a_killed_worker(lake: Lake, pages: list[bytes]) -> None:
    p, content = params(lake), many(pages, 30)
    told = drop_and_watch(lake, p, content, kill_a_worker)
    assert not told["error"]
    none_lost_none_twice(lake, p, content)


@pytest.mark.slow
def test_a_thousand_files_at_once(lake: Lake, pages: list[bytes]) -> None:
    p, content = params(lake), many(pages, 1000)
    drop_and_watch(lake, p, content)
    none_lost_none_twice(lake, p, content)


def test_a_watch_that_starts_again_does_nothing_twice_and_replays_what_changed(lake, pages) -> None:
    p, content = params(lake), {f"{i}.html": pages[i] for i in range(4)}
    manifest = refine_on_arrival(p, lake, content)
    assert manifest.counts.records_in == 4 and len(lake.table(manifest)) == 4
    before = files(lake)
    assert set(Counter(r["status"] for r in watch(p, lake, quiet_s=1))) == {"duplicate"}
    assert files(lake) == before
    strict = params(lake, min_words=5000)
    assert Counter(r["status"] for r in watch(strict, lake, quiet_s=1)) == {"duplicate": 4, "refined": 4}
    doc = lake.table(manifest).to_pylist()[0]
    told = trace(lake, doc["doc_id"], ["nowhere", "r"])
    for part in (doc["url"], doc["warc_filename"], "/extracted/", "/refined/", "the file is the same"):
        assert part in told
    lake.fs.pipe_file(f"{lake.root}/{doc['warc_filename']}", b"changed")
    assert "THE FILE CHANGED" in trace(lake, doc["doc_id"], ["r"])


def test_an_older_file_that_is_moved_in_is_the_newer_version(lake: Lake, pages: list[bytes]) -> None:
    p = params(lake, workers=1)
    refine_on_arrival(p, lake, {"a.html": pages[0]})
    old = Path(lake.root, "old.html")
    old.write_bytes(pages[1])
    os.utime(old, (1e9, 1e9))
    old.replace(Path(lake.root, "raw/r/a.html"))
    assert "refined" in {r["status"] for r in watch(p, lake, quiet_s=1)}
    (row,) = outcomes(p, lake)
    assert read_manifest(lake, row["refined"]).metrics["sha256"] == hashlib.sha256(pages[1]).hexdigest()


def test_the_command_watches_until_it_is_stopped(lake: Lake, pages: list[bytes], tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("workers: 1\n")
    words = [sys.executable, "-m", "kit.cli", "watch", str(tmp_path / "r.yaml"), "--lake", lake.uri]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as command:
        assert command.stdout.readline().startswith("watching raw/r/")
        put_file(lake, "raw/r/new.html", pages[0])
        assert [command.stdout.readline().split()[0] for _ in range(2)] == ["extracted", "refined"]
        command.send_signal(signal.SIGINT)
        assert command.wait(30) == 1 and "interrupted" in command.stderr.read()


def test_a_real_s3_server_end_to_end(s3: str, pages: list[bytes]) -> None:
    lake = Lake(f"{s3}/my lake")
    content = {f"d/p+{i} ü.html": pages[i] for i in range(4)} | {
        "bad.warc.gz": b"\x1f\x8b\x08" + bytes(99),
        "d/x.png": PNG,
    }
    manifest = refine_on_arrival(params(lake), lake, content)
    assert manifest.metrics["statuses"] == {"image": 1, "quarantined": 1, "refined": 4}
    assert sorted(lake.table(manifest)["warc_filename"].to_pylist()) == [
        f"raw/r/d/p+{i} ü.html" for i in range(4)
    ]
    assert lake.fs.exists(f"{lake.root}/raw/r/_quarantine/bad.warc.gz.reason.json")


def test_a_version_is_read_though_a_newer_one_is_there(s3: str, pages: list[bytes]) -> None:
    lake = Lake(f"{s3}/v")
    bucket, _, folder = lake.root.partition("/")
    key = f"{folder}/raw/r/a b.html"
    lake.fs.call_s3("put_bucket_versioning", Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    versions = [
        lake.fs.call_s3("put_object", Bucket=bucket, Key=key, Body=page)["VersionId"] for page in pages[:2]
    ]
    p, texts = params(lake), []
    for order, version in zip(("0A", "0B"), versions, strict=True):
        (first,) = handle({"Records": [record(bucket, key, order, versionId=version)]}, p, lake)["results"]
        texts.append(refined(lake, first)[0]["url"])
    assert texts[0] != texts[1] and len({page.split(b"canonical")[1][:80] for page in pages[:2]}) == 2
    assert outcomes(p, lake)[0]["extracted"] == first["commit"]


def test_what_the_watch_makes_is_what_aws_sends(lake: Lake) -> None:
    (x,) = event_module.landed(event_of(lake, "raw/r/a+b ü%41.html", 1.7e9))
    assert x.path == f"{lake.root}/raw/r/a+b ü%41.html" and x.time == "2023-11-14T22:13:20.000Z"
