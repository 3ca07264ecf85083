"""Fetching: every row ends as its own bytes or as an error with a name, whatever a server does; and politely."""

import email.utils
import io
import itertools
import logging
import multiprocessing
import os
import pickle
import random
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import fsspec
import pyarrow.parquet as pq
import pytest
from conftest import SAMPLE

from kit.data.extract.source import verified_page
from kit.data.read import archive, fetch, polite
from kit.data.read.fetch import may_retry, plan_ranges, read_ranges
from kit.errors import FetchError, Missing, RecordError
from kit.lake.files import fingerprint

INDEX = sorted((SAMPLE / "cc-index").rglob("*.parquet"))
PLACE = ["warc_filename", "warc_record_offset", "warc_record_length"]
END = "range past end of file"


@pytest.fixture
def web(server, monkeypatch):
    """The server without faults, a process that never asked before, and a clock on which sleeping takes no time."""
    server.faults, server.seen, server.etag, server.let_go = iter(()), [], '"1"', threading.Event()
    server.now, server.slept = [1000.0], []

    def sleep(seconds):
        server.slept.append(seconds)
        server.now[0] += seconds + 1e-6

    monkeypatch.setattr(polite, "clock", lambda: server.now[0])
    monkeypatch.setattr(polite, "sleep", sleep)
    monkeypatch.setattr(polite, "gate", polite.Gate())
    monkeypatch.setattr(polite, "policy", polite.Policy(requests_per_s=1e9, retries=2, timeout_s=5))
    fsspec.filesystem("http")._infos.clear()
    yield server
    server.let_go.set()


@pytest.fixture(scope="module")
def rows():
    """Every row of the sample's index in the order of the archives; one of them is planted past an end."""
    table = pq.ParquetDataset(INDEX, partitioning=None).read()
    table = table.select([*PLACE, "url", "content_digest"])
    found = table.sort_by([(name, "ascending") for name in PLACE]).to_pylist()
    assert len(found) > 800
    return [row | {"wrapping": "member"} for row in found]


@pytest.fixture(scope="module")
def local(rows):
    return plain(read_ranges(str(SAMPLE), rows))


@pytest.fixture(scope="module")
def few(rows):
    """Rows of one archive, whole in it."""
    return [row for row in rows if "2025-51" in row["warc_filename"]][:40]


def plain(found):
    """Results that can be compared: bytes, or the name of the error."""
    return [got.reason if isinstance(got, RecordError) else got for _, got in found]


def forever(fault):
    return itertools.repeat(fault)


def test_from_disk_each_row_gets_its_own_bytes(rows, local):
    assert Counter(x for x in local if isinstance(x, str)) == {END: 1}
    for row, got in zip(rows, local):
        file = SAMPLE / row["warc_filename"]
        start = row["warc_record_offset"]
        expected = file.read_bytes()[start : start + row["warc_record_length"]]
        assert got == (expected if len(expected) == row["warc_record_length"] else END)


def test_over_http_the_same_in_few_requests(web, rows, local):
    assert plain(read_ranges(web.uri, rows)) == local
    assert len(web.seen) == len({row["warc_filename"] for row in rows})
    agent, coding = (web.seen[0][4][name] for name in ("User-Agent", "Accept-Encoding"))
    assert agent.startswith("crawl-to-model-kit/") and coding == "identity"


def test_with_no_gap_allowed_only_the_records_travel(web, few):
    got = plain(read_ranges(web.uri, few[::2], gap_bytes=0))
    assert got == plain(read_ranges(str(SAMPLE), few[::2]))
    asked = [end - start for _, start, end, *_ in web.seen]
    assert asked == [row["warc_record_length"] for row in few[::2]]


# fault, its name, whether another try may help
FAULTS = [
    (403, "fetch: HTTP 403", True),
    (429, "fetch: HTTP 429", True),
    (500, "fetch: HTTP 500", True),
    (502, "fetch: HTTP 502", True),
    (503, "fetch: HTTP 503", True),
    (504, "fetch: HTTP 504", True),
    ("reset", "fetch: connection reset", True),
    ("short body", "fetch: short body", True),
    ("wrong start", "fetch: wrong Content-Range", True),
    ("wrong end", "fetch: wrong Content-Range", True),
    ("no Content-Range", "fetch: wrong Content-Range", True),
    ("silence", "fetch: timeout", True),
    ("stall", "fetch: timeout", True),
    ("dripping head", "fetch: timeout", True),
    ("dripping body", "fetch: timeout", True),
    (401, "fetch: HTTP 401", False),
    (404, "archive file missing", False),
    (410, "archive file missing", False),
    (501, "fetch: HTTP 501", False),
    ("range ignored", "fetch: range ignored", False),
    ((302, {"Location": "file:///etc/passwd"}), "fetch: redirect refused", False),
    ((302, {"Location": "http://127.0.0.1:9/x"}), "fetch: no connection", True),
    ((307, {"Location": "/again"}), "fetch: too many redirects", False),
]


@pytest.mark.parametrize(("fault", "reason", "again"), FAULTS, ids=[f"{f[0]}"[:20] for f in FAULTS])
def test_a_fault_that_stays_is_told_by_name_after_bounded_tries(web, few, fault, reason, again):
    polite.configure(retries=1, timeout_s=0.15 if "timeout" in reason else 5, min_bytes_per_s=1e9)
    web.faults = forever(fault)
    began = time.monotonic()
    assert Counter(plain(read_ranges(web.uri, few))) == {reason: len(few)}
    assert time.monotonic() - began < 10
    assert may_retry(reason) == again
    smaller = reason.endswith(fetch.SMALLER_MAY_WORK)
    hops = polite.MAX_REDIRECTS + 1 if "too many" in reason else 1
    assert len(web.seen) == hops * (1 + again) * (1 + polite.GIVE_UP_AFTER * smaller) - smaller


@pytest.mark.parametrize("fault", [f[0] for f in FAULTS if f[2]], ids=str)
def test_a_fault_that_passes_costs_one_retry_and_nothing_else(web, few, fault):
    polite.configure(timeout_s=0.5, min_bytes_per_s=1e9)
    web.faults = iter([fault])
    assert plain(read_ranges(web.uri, few)) == plain(read_ranges(str(SAMPLE), few))
    assert len(web.seen) == 2 and len(web.slept) >= 1


def test_a_body_for_an_ignored_range_is_not_read(web, few):
    web.faults = forever("range ignored")
    list(read_ranges(web.uri, few))
    assert web.sent < 1 << 24, "more than what the sockets' buffers hold was sent"


def test_wrong_bytes_are_found_by_the_digest(web, few):
    def end_of(found):
        try:
            return verified_page(*found, 5).url
        except RecordError as error:
            return error.reason

    assert [end_of(x) for x in read_ranges(web.uri, few)] == [row["url"] for row in few]
    web.faults = forever("wrong bytes")
    ends = [end_of(x) for x in read_ranges(web.uri, few, gap_bytes=0, max_bytes=0)]
    assert not {row["url"] for row in few} & set(ends)
    assert not any(map(may_retry, ends)), "wrong bytes come again"


@pytest.mark.parametrize("fault", ["reset", "short body", "wrong start", "stall"])
def test_one_bad_place_costs_one_record(web, few, fault):
    polite.configure(retries=0, timeout_s=0.5)
    bad = few[20]["warc_record_offset"]
    web.faults = forever(lambda path, start, end: fault if start <= bad < end else None)
    lost = [row for row, got in read_ranges(web.uri, few) if isinstance(got, RecordError)]
    assert lost == [few[20]]


def test_one_missing_file_costs_its_own_rows(web, rows, local):
    name = rows[0]["warc_filename"]
    web.faults = forever(lambda path, *_: 404 if path.endswith(name) else None)
    for row, got, here in zip(rows, plain(read_ranges(web.uri, rows)), local):
        assert got == ("archive file missing" if row["warc_filename"] == name else here)


def test_ranges_past_the_end_cost_no_neighbour(web, few):
    size = (SAMPLE / few[0]["warc_filename"]).stat().st_size
    late = [few[0] | {"warc_record_offset": size - 9, "warc_record_length": 10}]
    late += [few[0] | {"warc_record_offset": size + n} for n in (0, 5, 1 << 40)]
    for base in (web.uri, str(SAMPLE)):
        assert plain(read_ranges(base, few + late)) == plain(read_ranges(str(SAMPLE), few)) + [END] * 4


@pytest.mark.parametrize("place", [(-1, 5), (5, 0), (5, -5), (-5, -1)])
def test_a_row_without_a_valid_range_is_told(few, place):
    bad = few[3] | dict(zip(PLACE[1:], place))
    got = plain(read_ranges(str(SAMPLE), [*few[:3], bad, *few[3:5]]))
    assert got[3] == "no valid range" and [*got[:3], *got[4:]] == plain(read_ranges(str(SAMPLE), few[:5]))


def test_a_missing_and_an_unreadable_file_on_disk(few, tmp_path):
    (tmp_path / "folder").mkdir()
    names = ["none", "folder", "folder/none/x"]
    rows = [few[0] | {"warc_filename": name} for name in names]
    assert plain(read_ranges(str(tmp_path), rows)) == ["archive file missing"] * 3


@pytest.mark.parametrize("seed", range(20))
def test_a_plan_covers_every_row_in_order_and_within_bounds(seed):
    pick = random.Random(seed)
    rows = [
        dict(zip(PLACE, (pick.choice("ab"), pick.randrange(0, 9000), pick.randrange(1, 300))))
        for _ in range(200)
    ]
    if seed % 2:
        rows.sort(key=lambda row: [row[name] for name in PLACE])
    gap, most = pick.choice([0, 50]), pick.choice([0, 500, 5000])
    reads = list(plan_ranges(rows, gap, most))
    assert [row for read in reads for row in read.rows] == rows
    for read in reads:
        assert len(read.rows) == 1 or read.end - read.start <= most
        covered = read.start
        for row in read.rows:
            first, stop = row["warc_record_offset"], row["warc_record_offset"] + row["warc_record_length"]
            assert read.file == row["warc_filename"] and read.start <= first and stop <= read.end
            assert first - covered <= gap
            covered = max(covered, stop)
    if seed % 2 and most == 5000:
        assert len(reads) < 60


def test_pauses_grow_and_stay_bounded(web, few):
    polite.configure(retries=9)
    web.faults = iter([403] * 9)
    assert len(plain(read_ranges(web.uri, few[:1]))[0]) == few[0]["warc_record_length"]
    times = [seen[3] for seen in web.seen]
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert len(gaps) == 9
    for tried, gap in enumerate(gaps):
        longest = min(60, 2**tried)
        assert longest / 2 <= gap <= longest + 0.01
    assert len({round(g / min(60, 2**n), 3) for n, g in enumerate(gaps)}) > 3, "no jitter"


@pytest.mark.parametrize(
    ("told", "least", "most"),
    [
        ("7", 7, 7.1),
        ("in 90 s", 80, 91),
        ("in -90 s", 0, 1.1),
        ("100000", 300, 300.1),
        ("soon", 0, 1.1),
        ("-5", 0, 1.1),
        ("9" * 400, 0, 300.1),
    ],
)
@pytest.mark.parametrize("status", [403, 429, 503])
def test_retry_after_is_honoured_and_capped(web, few, status, told, least, most):
    if told.startswith("in"):
        told = email.utils.formatdate(time.time() + int(told.split()[1]), usegmt=True)
    web.faults = iter([(status, {"Retry-After": told})])
    list(read_ranges(web.uri, few))
    assert least <= web.seen[1][3] - web.seen[0][3] <= most


def test_a_pause_holds_for_all_requests_to_that_host_and_for_no_other(web, few):
    polite.configure(retries=0)
    web.faults = iter([(503, {"Retry-After": "40"})])
    first, second = read_ranges(web.uri, few[:1]), read_ranges(web.uri, few[1:2])
    assert plain(first) == ["fetch: HTTP 503"]
    polite.gate.wait("elsewhere.example")
    assert sum(web.slept) < 1
    list(second)
    assert web.seen[1][3] - web.seen[0][3] >= 40


def test_a_host_that_lets_every_read_fail_is_asked_once_each_until_one_works(web, few):
    alone = {"gap_bytes": 0, "max_bytes": 0}
    web.faults = forever(503)
    assert set(plain(read_ranges(web.uri, few, **alone))) == {"fetch: HTTP 503"}
    assert len(web.seen) == 3 * polite.GIVE_UP_AFTER + len(few) - polite.GIVE_UP_AFTER
    gaps = [b[3] - a[3] for a, b in zip(web.seen, web.seen[1:])]
    assert min(gaps) >= 0.5, "and never hastily"
    web.faults = iter(())
    assert not any(isinstance(x, str) for x in plain(read_ranges(web.uri, few[:5], **alone)))
    web.seen.clear()
    web.faults = forever(503)
    list(read_ranges(web.uri, few[:1]))
    assert len(web.seen) == 3


def test_the_rate_holds(web, few):
    polite.configure(requests_per_s=4)
    list(read_ranges(web.uri, few[:20], gap_bytes=0, max_bytes=0))
    times = [seen[3] for seen in web.seen]
    assert len(times) == 20
    assert min(b - a for a, b in itertools.pairwise(times)) >= 0.25


def test_the_rate_holds_for_threads_together(web, few, monkeypatch):
    monkeypatch.setattr(polite, "clock", time.monotonic)
    monkeypatch.setattr(polite, "sleep", time.sleep)
    polite.configure(requests_per_s=100)
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda row: plain(read_ranges(web.uri, [row]))[0], few))
    assert got == plain(read_ranges(str(SAMPLE), few))
    times = sorted(seen[3] for seen in web.seen)
    assert times[-1] - times[0] >= (len(few) - 1) / 100 - 0.02


def test_redirects_are_followed(web, few):
    web.faults = iter([(302, {"Location": f"/{few[0]['warc_filename']}?signed=1"})])
    assert plain(read_ranges(web.uri, few)) == plain(read_ranges(str(SAMPLE), few))
    assert web.seen[1][0].endswith("?signed=1")


def test_nothing_secret_is_told(web, caplog):
    caplog.set_level(logging.DEBUG, "kit")
    polite.configure(retries=0)
    secret = "".join("hunter" + n for n in "2")  # the source lines of a traceback must not hold it either
    host = web.uri.removeprefix("http://")
    url = f"http://me:{secret}@{host}/x/y.warc.gz?X-Amz-Signature={secret}#{secret}"
    bad_redirect = 302, {"Location": f"file://u:{secret}@x/?{secret}"}
    for fault in (403, "reset", 404, bad_redirect, (503, {"Retry-After": "9999"})):
        web.faults = forever(fault)
        with pytest.raises(FetchError) as error:
            fsspec.filesystem("http").info(url)
        told = "".join(traceback.format_exception(error.value)) + repr(error.value) + caplog.text
        assert "y.warc.gz" in told or "file://x" in told
        assert secret not in told


def test_a_file_over_http_is_a_file(web, few):
    name = few[0]["warc_filename"]
    fs, uri, data = fsspec.filesystem("https"), f"{web.uri}/{name}", (SAMPLE / name).read_bytes()
    assert isinstance(fs, polite.PoliteHTTP) and fs.exists(uri) and fs.find(uri) == fs.glob(uri) == [uri]
    assert (
        fs.cat_file(uri) == data
        and fs.cat_file(uri, -9) == data[-9:]
        and fs.cat_file(uri, 5, -5) == data[5:-5]
    )
    assert fs.cat_file(uri, len(data) - 3, len(data) + 99) == data[-3:] and fs.cat_file(uri, 9, 9) == b""
    assert fs.info(uri)["size"] == len(data)
    with fsspec.open(uri, "rb") as f:
        f.seek(-10, io.SEEK_END)
        assert f.read(99) == data[-10:]
        f.seek(1000)
        again = pickle.loads(pickle.dumps(f))
        assert f.read(100) == again.read(100) == data[1000:1100]
    with fsspec.open(f"{web.uri}/crawl-data/CC-SAMPLE-2026-05/warc.paths.gz", "rt", compression="infer") as f:
        assert len(f.read().splitlines()) == 3
    assert list(archive.scan_archive(uri, "x")) == list(archive.scan_archive(str(SAMPLE / name), "x"))
    with pytest.raises(FetchError, match="read-only"):
        fs.open(uri, "wb")


def test_parquet_is_read_by_exact_ranges(web):
    uri = f"{web.uri}/{INDEX[0].relative_to(SAMPLE)}"
    fs = fsspec.filesystem("http")
    with fs.open(uri) as f:
        f.seek(-8, io.SEEK_END)
        assert f.read(8)[4:] == b"PAR1"
        f.seek(100)
        f.read(5)
    assert [end - start for _, start, end, *_ in web.seen] == [1, 8, 5]
    assert pq.read_table(uri, filesystem=fs, columns=["url"]).equals(pq.read_table(INDEX[0], columns=["url"]))
    assert set(Counter((start, end) for _, start, end, *_ in web.seen).values()) == {1}, (
        "nothing is asked for twice"
    )


def test_what_is_not_there_and_what_is_refused_are_two_things(web):
    polite.configure(retries=1)
    fs = fsspec.filesystem("http")
    assert not fs.exists(f"{web.uri}/none")
    with pytest.raises(Missing) as error:
        fs.info(f"{web.uri}/none")
    assert (
        isinstance(error.value, FileNotFoundError)
        and pickle.loads(pickle.dumps(error.value)).reason == "fetch: HTTP 404"
    )
    for listing in (fs.find, fs.glob, fs.info):
        with pytest.raises(FetchError, match="nothing can be listed over HTTP"):
            listing(f"{web.uri}/crawl-data/")
    with pytest.raises(FetchError, match="nothing can be listed over HTTP"):
        archive.list_archives([f"{web.uri}/crawl-data/"])
    web.faults = forever(403)
    with pytest.raises(FetchError, match="HTTP 403"):
        fs.exists(f"{web.uri}/refused")


def test_an_empty_file_and_one_that_shrank(web):
    fs = fsspec.filesystem("http")
    name = INDEX[0].relative_to(SAMPLE)
    web.faults = iter([(416, {"Content-Range": "bytes */0"})])
    assert fs.info(f"{web.uri}/{name}?1")["size"] == 0
    size = INDEX[0].stat().st_size
    web.faults = iter([(416, {"Content-Range": f"bytes */{size + 50}"})])
    with fs.open(f"{web.uri}/{name}?2") as f, pytest.raises(FetchError, match="short body"):
        f.seek(size - 5)
        f.read(20)


def test_the_fingerprint_follows_size_and_tag(web):
    uri = f"{web.uri}/{INDEX[0].relative_to(SAMPLE)}"
    one = fingerprint(uri)
    web.etag = '"2"'
    assert fingerprint(uri) == one, "known for a minute"
    web.now[0] += 61
    assert fingerprint(uri) != one


def test_a_fork_shares_no_connection_with_its_parent(web, few):
    here = plain(read_ranges(web.uri, few))
    ours, theirs = multiprocessing.Pipe()

    def child():
        assert not polite._session.cache_info().currsize
        theirs.send(plain(read_ranges(web.uri, few[:5])))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    again = plain(read_ranges(web.uri, few))
    assert ours.poll(10) and ours.recv() == here[:5] and again == here
    process.join()


def test_a_host_that_is_not_there(web, few):
    polite.configure(retries=1, timeout_s=2)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    assert set(plain(read_ranges(f"http://127.0.0.1:{port}", few))) == {"fetch: no connection"}
    assert set(plain(read_ranges("http://no-such-host.invalid", few))) == {"fetch: no connection"}
    assert set(plain(read_ranges(web.uri.replace("http:", "https:"), few))) == {"fetch: TLS error"}


def test_importing_the_module_takes_over_http():
    code = "import kit.data.read.fetch, fsspec; print(fsspec.get_filesystem_class('https').__name__)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "PoliteHTTP\n"
    )


def test_what_a_rerun_asks_for_again():
    again = [
        "HTTP 403",
        "HTTP 429",
        "HTTP 500",
        "HTTP 503",
        "HTTP 522",
        "timeout",
        "connection reset",
        "short body",
    ]
    assert all(may_retry(f"fetch: {reason}") for reason in again)
    never = [
        "HTTP 400",
        "HTTP 401",
        "HTTP 404",
        "HTTP 416",
        "HTTP 501",
        "range ignored",
        "too many redirects",
    ]
    other = ["archive file missing", END, "digest is not the index's", "timeout", "gzip corrupt", ""]
    assert not any(map(may_retry, [f"fetch: {reason}" for reason in never] + other))


@pytest.fixture(scope="module")
def bucket(s3, few):
    name = few[0]["warc_filename"]
    fsspec.filesystem("s3").pipe_file(f"lake-bucket/crawl/{name}", (SAMPLE / name).read_bytes())
    return "s3://lake-bucket/crawl"


@pytest.fixture
def quick(web):
    """A policy for S3: its requests go through the same gate, on a clock that costs nothing."""
    polite.configure(retries=1, timeout_s=5)
    return web


def test_over_s3_the_same_in_few_requests(bucket, quick, few):
    size = (SAMPLE / few[0]["warc_filename"]).stat().st_size
    late = [few[0] | {"warc_record_offset": size + n} for n in (-9, 0, 1 << 30)]
    got = plain(read_ranges(bucket, few + late))
    assert got == plain(read_ranges(str(SAMPLE), few)) + [END] * 3
    assert len(list(plan_ranges(few + late))) == 2 and not quick.slept


def test_a_missing_object_and_a_missing_bucket(bucket, quick, few):
    missing = few[0] | {"warc_filename": "none.warc.gz"}
    assert plain(read_ranges(bucket, [missing, few[1]]))[0] == "archive file missing"
    assert set(plain(read_ranges("s3://no-such-bucket/x", few))) <= {
        "archive file missing",
        "fetch: HTTP 403",
    }
    assert not quick.slept


def test_wrong_and_no_credentials(bucket, quick, few, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    assert set(plain(read_ranges(bucket, few))) == {"fetch: HTTP 403"}
    assert not quick.slept and may_retry("fetch: HTTP 403")
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", os.devnull)
    assert set(plain(read_ranges(bucket, few))) == {"fetch: no credentials"}


@pytest.mark.parametrize("fault", [503, 500, "silence", "reset", "short body", "dripping body"])
def test_an_s3_in_trouble_is_tried_again_with_pauses(bucket, web, few, fault, monkeypatch):
    """The faulty HTTP server stands in for S3: a client that signs its requests reads the same ranges from it."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", web.uri)
    polite.configure(retries=2, timeout_s=0.3, min_bytes_per_s=1e9)
    rows = [few[0] | {"warc_filename": few[0]["warc_filename"].removeprefix("crawl-data/")}]
    web.faults = forever(fault)
    (reason,) = plain(read_ranges("s3://crawl-data", rows))
    # a client that is still being made when the time is up has not asked yet
    assert may_retry(reason) and 1 <= len(web.seen) <= 3 and len(web.slept) == 2
    web.faults = iter(())
    polite.configure(timeout_s=5)
    polite.gate.given_up.clear()
    assert plain(read_ranges("s3://crawl-data", rows)) == plain(read_ranges(str(SAMPLE), few[:1]))
