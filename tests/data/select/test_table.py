"""Reading the index where it lies: the same answers on a disk, over HTTP and on S3, few bytes, and told in bytes."""

import gzip
import re
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import big_index
import fsspec
import pyarrow.parquet as pq
import pytest
from conftest import CRAWL, SAMPLE

from kit.data.read import polite
from kit.data.select.index import Index, explore_index
from kit.data.select.table import athena_usd
from kit.errors import FetchError, ParamError
from kit.lake.store import Lake
from kit.params import ExploreIndex

QUESTIONS = {
    "languages": lambda index: index.count_by("content_languages"),
    "days": lambda index: index.count_by("fetch_day"),
    "site": lambda index: index.find("www.reelnotes.example"),
    "reasons": lambda index: index.reasons(),
    "selection": lambda index: index.select().to_pylist(),
}


class Ranges(SimpleHTTPRequestHandler):
    """A static file server that knows ranges and counts the bytes of files that it sends."""

    sent = 0

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            return self.send_error(404)
        data, wanted = path.read_bytes(), re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"] or "")
        first, last = (int(wanted[1]), int(wanted[2])) if wanted else (0, len(data) - 1)
        body = data[first : last + 1]
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{first + len(body) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        type(self).sent += len(body)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def serve(monkeypatch):
    """`serve(folder)` puts it on HTTP, with the list of index files that Common Crawl keeps for each crawl."""
    made = []
    monkeypatch.setattr(polite, "policy", polite.Policy(requests_per_s=1e6))

    def start(folder: Path, crawl: str, lists: Path) -> str:
        lists = lists / "crawl-data" / crawl
        lists.mkdir(parents=True)
        files = sorted(f.relative_to(folder).as_posix() for f in folder.glob("cc-index/table/**/*.parquet"))
        (lists / "cc-index-table.paths.gz").write_bytes(gzip.compress("\n".join(files).encode()))

        class Both(Ranges):
            def translate_path(self, path: str) -> str:
                found = super().translate_path(path)
                return str(lists / Path(path).name) if path.endswith(".paths.gz") and crawl in path else found

        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Both, directory=str(folder)))
        Thread(target=server.serve_forever, daemon=True).start()
        server.handler = Both
        made.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    start.servers = made
    yield start
    for server in made:
        server.shutdown()
        server.server_close()


def test_over_http_the_answers_are_those_of_the_disk(serve, tmp_path: Path) -> None:
    address = serve(SAMPLE, CRAWL, tmp_path)
    far = Index(ExploreIndex(index_path=f"{address}/cc-index/table/cc-main/warc"))
    near = Index(ExploreIndex())
    assert far.rows == near.rows == 797 and len(far.files.paths) == 3, "only this crawl's files of the list"
    for name, ask in QUESTIONS.items():
        assert ask(far) == ask(near), name
    told = sum(s.read_bytes for s in far.scans)
    assert 0 < told < far.files.bytes == pytest.approx(serve.servers[0].handler.sent, abs=500)


def test_a_stage_over_http_selects_the_same(serve, tmp_path: Path, data_lake: Lake) -> None:
    address = serve(SAMPLE, CRAWL, tmp_path)
    lake = Lake(str(tmp_path / "lake"))
    p = ExploreIndex(lake=lake.uri, index_path=f"{address}/cc-index/table/cc-main/warc")
    manifest = explore_index(p, lake)
    assert manifest.content_sha256 == data_lake.need("sample", "10_explore_index").content_sha256
    assert [i.uri for i in manifest.inputs] == [f"{address}/crawl-data/{CRAWL}/cc-index-table.paths.gz"]


def test_an_index_on_s3_is_read_in_place(s3) -> None:
    store = fsspec.filesystem("s3", skip_instance_cache=True)
    for path in SAMPLE.glob("cc-index/table/**/*.parquet"):
        store.put_file(str(path), f"lake-bucket/{path.relative_to(SAMPLE)}")
    far = Index(ExploreIndex(index_path="s3://lake-bucket/cc-index/table/cc-main/warc"))
    for name, ask in QUESTIONS.items():
        assert ask(far) == ask(Index(ExploreIndex())), name
    assert far.crawls == [CRAWL.replace("2026-05", "2025-51"), CRAWL]


def test_files_and_lists_can_be_named_one_by_one(tmp_path: Path) -> None:
    files = sorted(SAMPLE.glob(f"cc-index/table/cc-main/warc/crawl={CRAWL}/**/*.parquet"))
    other = sorted(SAMPLE.glob("cc-index/table/cc-main/warc/crawl=CC-SAMPLE-2025-51/**/*.parquet"))
    listed = tmp_path / "paths"
    listed.write_text("\n".join(f.relative_to(SAMPLE).as_posix() for f in [*files, *other]) + "\n")
    whole = Index(ExploreIndex()).count_by("subset")
    assert Index(ExploreIndex(index_files=[str(listed)])).count_by("subset") == whole
    assert Index(ExploreIndex(index_files=[*map(str, files), str(other[0])])).count_by("subset") == whole
    bare = tmp_path / "part.parquet"  # no partition in its path: rows of the crawl that was asked for
    pq.write_table(pq.ParquetFile(files[-1]).read(), bare)
    assert Index(ExploreIndex(index_files=[str(bare)])).count_by("subset")[0]["subset"] == "(none)"
    with pytest.raises(ParamError, match="no index of crawl 'CC-MAIN-2099-01' in .*paths"):
        Index(ExploreIndex(crawl="CC-MAIN-2099-01", index_files=[str(listed)]))
    with pytest.raises(ParamError, match="no list of index files"):
        Index(ExploreIndex(index_files=[str(tmp_path / "missing.paths.gz")]))
    bare.write_bytes(b"not Parquet at all")
    with pytest.raises(ParamError, match="no Parquet file"):
        Index(ExploreIndex(index_files=[str(bare)]))


def a_site(index: Index, pages: int) -> str:
    """The largest domain of no more than `pages` pages."""
    counted = index.count_by("url_host_registered_domain", 5000)
    return next(r["url_host_registered_domain"] for r in counted if r["pages"] <= pages)


def site_over_http(folder: Path, serve, tmp_path: Path, pages: int) -> tuple[float, Index, str]:
    """Share of the table's bytes that a server sent for one site's rows, footers and list included."""
    site = a_site(Index(ExploreIndex(index_path=str(folder), crawl=big_index.CRAWL)), pages)
    address = serve(folder.parents[3], big_index.CRAWL, tmp_path)
    index = Index(ExploreIndex(index_path=f"{address}/cc-index/table/cc-main/warc", crawl=big_index.CRAWL))
    found = index.find(site)
    assert found and {r["url"].split("/")[2].endswith(site) for r in found} == {True}
    everything = Index(ExploreIndex(index_path=str(folder), crawl=big_index.CRAWL))
    plain = everything.sql(f"SELECT url FROM ccindex WHERE ends_with(url_host_name, '{site}') ORDER BY url")
    assert sorted(r["url"] for r in found) == [r["url"] for r in plain]
    sent = serve.servers[-1].handler.sent
    assert sent == pytest.approx(index.files.bytes, abs=2000), "what is told is what was sent"
    return sent / index.files.table_bytes, index, site


@pytest.fixture(scope="module")
def middling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return big_index.make(tmp_path_factory.mktemp("index"), 100_000, files=2, group=5_000, page=1_000)


def test_a_site_costs_a_small_part_of_the_table(middling: Path, serve, tmp_path: Path) -> None:
    share, index, site = site_over_http(middling, serve, tmp_path, 100)
    assert share < 0.06, "twenty row groups, of which one or two can hold the site"
    scan = index.scans[-1]
    assert scan.row_groups <= 2 and scan.row_groups_in_all == 20
    index.sql(f"SELECT url, warc_filename FROM ccindex WHERE contains(url, '{site}')")
    unpruned = index.scans[-1]
    assert unpruned.row_groups == 20, "a URL alone skips nothing"
    assert unpruned.read_bytes > 5 * scan.read_bytes


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_site_of_five_million_rows_costs_less_than_a_hundredth(serve, tmp_path: Path) -> None:
    share, *_ = site_over_http(big_index.make(tmp_path / "index", 5_000_000), serve, tmp_path, 1200)
    assert share < 0.01


def test_rows_of_other_domains_are_counted_but_not_read(middling: Path) -> None:
    values = {"index_path": str(middling), "crawl": big_index.CRAWL}
    site = a_site(Index(ExploreIndex(**values)), 100)
    index = Index(ExploreIndex(domains=[site], **values))
    reasons = index.reasons()
    assert reasons.total() == 100_000 and reasons["kept"] == index.select().num_rows > 0
    assert reasons["domain"] == 100_000 - len(index.find(site))
    assert index.files.bytes < 0.1 * index.files.table_bytes


def test_the_plan_is_the_chunks_of_the_columns_asked(middling: Path) -> None:
    index = Index(ExploreIndex(index_path=str(middling), crawl=big_index.CRAWL))
    chunks = dict.fromkeys(("content_languages", "content_mime_detected", "url"), 0)
    for path in middling.rglob("*.parquet"):
        told = pq.ParquetFile(path).metadata
        for g in range(told.num_row_groups):
            for c in (told.row_group(g).column(i) for i in range(told.num_columns)):
                if c.path_in_schema in chunks:
                    chunks[c.path_in_schema] += c.total_compressed_size
    two = index.estimate(
        "SELECT content_languages, count(*) FROM ccindex WHERE content_mime_detected = 'text/html' GROUP BY 1"
    )
    assert two.planned_bytes == chunks["content_languages"] + chunks["content_mime_detected"]
    assert index.estimate("SELECT url FROM ccindex").planned_bytes == chunks["url"]
    assert index.estimate("SELECT count(*) FROM ccindex").planned_bytes == 0
    assert index.estimate("SELECT url FROM ccindex WHERE subset = 'robotstxt'").row_groups == 0
    either = "url_host_tld = 'de' OR url_host_registered_domain = 'x'"
    assert index.estimate(f"SELECT url FROM ccindex WHERE {either}").row_groups == 20, "OR excludes nothing"
    assert 0 < index.estimate("SELECT url FROM ccindex WHERE url_host_tld IN ('de', 'fr')").row_groups < 8
    index.sql("SELECT url FROM ccindex")
    assert index.scans[-1].read_bytes == pytest.approx(chunks["url"], rel=0.1)


def test_a_question_that_reads_too_much_is_refused_before_it_is_asked(middling: Path) -> None:
    values = {"index_path": str(middling), "crawl": big_index.CRAWL, "max_scan_gb": 0.001}
    index = Index(ExploreIndex(**values))
    before = index.files.requests
    with pytest.raises(ParamError, match="would read 0.01.* GB of the index, and max_scan_gb allows 0.001"):
        index.sql("SELECT * FROM ccindex")
    assert index.files.requests == before and index.count_by("language")


def test_athena_charges_ten_megabytes_at_least() -> None:
    assert athena_usd(0, 5) == athena_usd(10_000_000, 5) == pytest.approx(0.00005)
    assert athena_usd(10_000_001, 5) == pytest.approx(0.000055)
    assert athena_usd(10**12, 5) == pytest.approx(5)


def test_a_store_that_breaks_off_is_told_by_its_own_error(middling: Path, monkeypatch) -> None:
    index = Index(ExploreIndex(index_path=str(middling), crawl=big_index.CRAWL))

    def gone(*_, **__):
        raise FetchError("fetch: HTTP 503", "https://far/part.parquet")

    monkeypatch.setattr(index.files.fs, "cat_file", gone)
    with pytest.raises(FetchError, match="503"):
        index.count_by("url_host_name")
