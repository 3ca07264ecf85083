"""Your own job: every record is in a row or has a reason, on one core, on two, and on a cluster."""

import gzip
import json
import subprocess
from collections import Counter
from pathlib import Path

import fsspec
import pytest
from conftest import SAMPLE, run_data_stages
from support import MEMBERS, SITE, record

from kit import ROOT
from kit.data import job
from kit.data.job import load_job, run_archives, run_job
from kit.data.read import archive
from kit.data.read.archive import Record
from kit.errors import JobError, LakeError, RecordError
from kit.lake.store import Lake
from kit.params import WriteYourOwnJob

ROWS = """
SCHEMA = {"url": "string", "n": "int64"}
def record(r):
    number = int(r.url.rpartition("/")[2] or -1)
    if number == 1:
        return None
    if number == 2:
        return [{"url": r.url, "n": i} for i in range(3)]
    if number == 3:
        raise ZeroDivisionError("three")
    if number == 4:
        return {"url": r.url, "n": "not a number"}
    if number == 5:
        return {"url": r.url, "m": 1}
    if number == 6:
        r.payload
    return {"url": r.url, "n": number}
"""


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return Lake(str(tmp_path / "lake"))


def written(folder: Path, text: str) -> str:
    (folder / "my_job.py").write_text(text)
    return str(folder / "my_job.py")


def archives(folder: Path, count: int = 3) -> list[tuple[str, str]]:
    """Files of nine records each, one of which cannot be decoded and one stretch of which is broken."""
    cut = gzip.compress(record(6, b"\x00\x01", b"Content-Encoding: zstd\r\n"))
    data = [gzip.compress(record(i)) for i in (0, 1, 2, 3, 4, 5)] + [
        cut,
        b"garbage" * 9,
        MEMBERS[0],
        MEMBERS[1],
    ]
    for i in range(count):
        (folder / f"{i}.warc.gz").write_bytes(b"".join(data))
    return [(str(folder / f"{i}.warc.gz"), f"{i}.warc.gz") for i in range(count)]


def test_every_record_is_in_a_row_or_has_a_reason(tmp_path: Path, lake: Lake) -> None:
    p = WriteYourOwnJob(run="r", lake=lake.uri, job=written(tmp_path, ROWS), cores=2, part_mb=0.001)
    manifest = run_job(p, lake, archives(tmp_path))
    counts = manifest.counts
    assert counts.records_in == 3 * 10 and counts.records_out == 3 * 5 and counts.created == 3 * 2
    assert counts.dropped == {"no row": 6}
    assert counts.failed == {
        "ArrowInvalid": 3,
        "KeyError": 3,
        "ZeroDivisionError": 3,
        "archive: not gzip": 3,
        "content encoding zstd": 3,
    }
    assert Counter(r["n"] for r in lake.table(manifest).to_pylist()) == {0: 9, 1: 3, 2: 3}
    told = {r["reason"]: r for r in lake.table(manifest, "failures").to_pylist()}
    assert told["ZeroDivisionError"]["message"] == "ZeroDivisionError: three (line 10)"
    assert told["ZeroDivisionError"]["url"] == SITE + "3"
    assert "m not in SCHEMA" in told["KeyError"]["message"]


def test_cores_change_nothing_and_parts_are_planned_by_bytes(tmp_path: Path, lake: Lake) -> None:
    files = archives(tmp_path, 5)
    made = []
    for cores, part_mb in ((1, 0.001), (2, 0.001), (2, 64)):
        p = WriteYourOwnJob(
            run=f"{cores}-{part_mb}", lake=lake.uri, job=written(tmp_path, ROWS), cores=cores, part_mb=part_mb
        )
        made.append(run_job(p, lake, files))
    assert [m.metrics["tasks"] for m in made] == [5, 5, 1]
    assert made[0].content_sha256 == made[1].content_sha256
    assert lake.table(made[0]).equals(lake.table(made[2]))


@pytest.mark.parametrize("most", [1, 8, 9, 10, 20, 26])
def test_a_limit_is_exact_and_takes_the_first(tmp_path: Path, lake: Lake, most: int) -> None:
    text = 'SCHEMA = {"at": "int64", "file": "string"}\ndef record(r): return {"at": r.offset, "file": r.warc_filename}'
    files = archives(tmp_path)
    p = WriteYourOwnJob(
        run="r", lake=lake.uri, job=written(tmp_path, text), cores=2, max_records=most, part_mb=0.001
    )
    manifest = run_job(p, lake, files)
    first = [
        (r.offset, name) for path, name in files for r in archive.records(path, name) if isinstance(r, Record)
    ]
    assert [(r["at"], r["file"]) for r in lake.table(manifest).to_pylist()] == first[:most]
    assert manifest.counts.records_out == most


COUNTING = """
COUNT_BY = "last"
def record(r):
    return {"last": r.url[-1]} if r.url[-1] != "5" else None
"""


def test_counts_are_added_up_over_tasks(tmp_path: Path, lake: Lake) -> None:
    p = WriteYourOwnJob(run="r", lake=lake.uri, job=written(tmp_path, COUNTING), cores=2, part_mb=0.001)
    manifest = run_job(p, lake, archives(tmp_path))
    found = [(r["last"], r["n"]) for r in lake.table(manifest).to_pylist()]
    assert found == [("0", 6), ("1", 6), ("2", 3), ("3", 3), ("4", 3), ("6", 3)]
    assert manifest.counts.dropped == {"counted with others": 24 - 6, "no row": 3}
    assert manifest.counts.records_in == 30 and manifest.counts.records_out == 6


def test_an_archive_that_is_not_there_is_a_failure_by_name(tmp_path: Path, lake: Lake) -> None:
    p = WriteYourOwnJob(run="r", lake=lake.uri, job=written(tmp_path, COUNTING), cores=2)
    with_missing = [*archives(tmp_path, 1), ("memory://nowhere.warc", "nowhere.warc")]
    manifest = run_job(p, lake, with_missing)
    assert manifest.counts.failed == {"archive: ArchiveError": 1, "archive: not gzip": 1}
    assert manifest.counts.records_out == 6


@pytest.mark.parametrize(
    "text, why",
    [
        ("COUNT_BY = ['x']", "no function `record"),
        ("def record(r): return {}", "neither SCHEMA"),
        ("def record(r) return", "SyntaxError: .*line 1"),
        ("import nowhere_at_all", "No module named 'nowhere_at_all'.*line 1"),
        ("SCHEMA = {'x': 'txet'}\ndef record(r): pass", "txet"),
        ("COUNT_BY = 'n'\ndef record(r): pass", "cannot have a column 'n'"),
    ],
)
def test_a_job_that_cannot_run_is_one_clear_line(text: str, why: str) -> None:
    with pytest.raises(JobError, match=why) as error:
        load_job(text, "my_job.py")
    assert "\n" not in str(error.value)


def test_a_job_that_always_fails_is_no_success(tmp_path: Path, lake: Lake) -> None:
    text = 'COUNT_BY = "x"\ndef record(r): return {"y": 1}'
    p = WriteYourOwnJob(run="r", lake=lake.uri, job=written(tmp_path, text), cores=2)
    with pytest.raises(LakeError, match="27 KeyError"):
        run_job(p, lake, archives(tmp_path))


def test_rows_of_one_record_count_all_or_not_at_all() -> None:
    text = 'COUNT_BY = "x"\ndef record(r):\n    yield {"x": 1}\n    raise ValueError'
    tally = run_archives(load_job(text, "j"), [(str(next(SAMPLE.rglob("*00000.warc.gz"))), "x")], "j", 5)
    assert (tally.read, tally.rows, tally.failed) == (5, 0, {"ValueError": 5})
    assert not tally.groups


def test_archives_on_s3_give_the_same(tmp_path: Path, s3: str) -> None:
    fsspec.get_filesystem_class("s3").clear_instance_cache()  # other modules had a server of their own
    fs = fsspec.filesystem("s3")
    local = archives(tmp_path)
    for path, name in local:
        fs.put_file(path, f"lake-bucket/archives/{name}")
    far = [(f"s3://lake-bucket/archives/{name}", name) for _, name in local]
    here, there = (run_archives(load_job(ROWS, "j"), files, "j") for files in (local, far))
    assert (here.rows, here.dropped, here.failed, here.examples) == (
        there.rows,
        there.dropped,
        there.failed,
        there.examples,
    )
    assert here.tables == there.tables and here.rows == 15
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def shipped(name: str) -> job.OwnJob:
    path = ROOT / "notebooks" / "jobs" / f"{name}.py"
    return load_job(path.read_text(encoding="utf-8"), str(path))


def test_the_shipped_server_count_is_right(lake: Lake) -> None:
    run_data_stages(lake, "sample", until="10")
    manifest = run_job(WriteYourOwnJob(run="sample", lake=lake.uri, cores=2), lake)
    expected: Counter[str] = Counter()
    names = lake.fs.cat_file(lake.paths(lake.need("sample", "10_explore_index"), "archives.txt")[0]).decode()
    for name in names.split():
        for r in archive.records(str(SAMPLE / name)):
            if isinstance(r, Record) and r.type == "response":
                told = [
                    x
                    for x in r.block.split(b"\r\n\r\n")[0].split(b"\r\n")
                    if x.lower().startswith(b"server: ")
                ]
                expected[told[0][8:].decode() if told else "(none)"] += 1
    rows = lake.table(manifest).to_pylist()
    assert {r["server"]: r["n"] for r in rows} == expected and len(rows) == 3
    assert manifest.counts.failed  # the sample is damaged on purpose


def test_the_shipped_reviews_have_film_rating_and_text_but_no_author(crawl_planted: dict) -> None:
    files = [
        (str(f), f.name) for f in sorted((SAMPLE / "crawl-data" / "CC-SAMPLE-2026-05").rglob("warc/*.gz"))
    ]
    tally = run_archives(shipped("site_reviews"), files)
    rows = [row for table in tally.tables for row in table.to_pylist()]
    planted = {x["url"]: x for x in crawl_planted["review"] if "reelnotes" in x["url"]}
    assert len({r["url"] for r in rows} & set(planted)) > 0.95 * len(planted)
    for row in rows:
        assert (row["film"], row["rating"]) == (planted[row["url"]]["film"], planted[row["url"]]["stars"])
    names = {
        json.loads(script)["author"]["name"]
        for path, _ in files
        for r in archive.records(path)
        if isinstance(r, Record) and "reelnotes" in r.url and r.type == "response" and b'"Review"' in r.block
        for script in shipped_json(r)
    }
    assert len(names) > 100
    text = json.dumps(rows, ensure_ascii=False)
    assert not [n for n in names if n in text]


def shipped_json(r: Record) -> list[str]:
    try:
        return [x.split("</script>")[0] for x in r.payload.decode("utf-8", "replace").split('ld+json">')[1:]]
    except RecordError:
        return []


REVIEW = {
    "@type": "Review",
    "itemReviewed": {"@type": "Movie", "name": "Rain"},
    "reviewRating": {"ratingValue": 4},
    "author": {"@type": "Person", "name": "Ann Lee-Moor"},
    "name": "Ann Lee-Moor saw it",
    "reviewBody": "I, ANN LEE-MOOR, liked it. Yours, Ann. Lee-Moor out. The annals agree.",
}


@pytest.mark.parametrize(
    "author", [REVIEW["author"], "Ann Lee-Moor", [{"name": "Bo"}, REVIEW["author"]], None, 7, {}]
)
def test_an_author_is_masked_wherever_named(author: object) -> None:
    html = f'<script type="application/ld+json">{json.dumps(REVIEW | {"author": author})}</script>'
    (r,) = list(shipped("site_reviews").record(answer("https://www.reelnotes.example/x", html.encode())))
    assert r["film"] == "Rain" and r["rating"] == 4
    if author and author != 7:
        assert (
            r["review"]
            == "<PERSON> saw it\n\nI, <PERSON>, liked it. Yours, <PERSON>. <PERSON> out. The annals agree."
        )
    else:
        assert "Ann Lee-Moor saw it" in r["review"]


def answer(url: str, body: bytes) -> Record:
    from kit.data.read.record import find_head

    raw = record(0, body).replace(b"%s0" % SITE.encode(), url.encode())
    head = find_head(raw)
    return Record(head, raw[head.size : head.size + head.length])


@pytest.mark.slow
def test_on_a_cluster_the_result_is_the_local_one(
    tmp_path: Path, lake: Lake, cluster: tuple[str, dict[str, str]]
) -> None:
    master, here = cluster
    files = archives(tmp_path, 6)
    (tmp_path / "archives.txt").write_text("".join(f"{name}\n" for _, name in files))
    p = WriteYourOwnJob(run="job", lake=lake.uri, job=written(tmp_path, ROWS), cores=2, part_mb=0.001)
    local = run_job(p, lake, files)
    words = [
        "--job",
        "my_job.py",
        "--archives",
        "archives.txt",
        "--base",
        ".",
        "--out",
        "far",
        "--part-mb",
        "0.001",
    ]
    done = subprocess.run(
        [f"{here['SPARK_HOME']}/bin/spark-submit", "--master", master, str(ROOT / "kit" / "data" / "job.py"), *words],
        env=here, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    far = Lake(str(tmp_path / "far"))
    manifest = far.need("job", "21_write_your_own_job")
    assert manifest.counts == local.counts and manifest.content_sha256 == local.content_sha256
    assert far.table(manifest).equals(lake.table(local))
    assert json.loads(done.stdout[done.stdout.index("{") :])["counts"] == local.counts.model_dump()
    # that is: not on a master of this process's own
    logs = sorted(tmp_path.glob("work/*/*/stderr"))
    assert len({log.parent.name for log in logs}) == 2 and len(logs) >= 2, "both workers had an executor"


def test_the_command_line_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "archives.txt").write_text("x.warc.gz\n")
    words = ["--archives", str(tmp_path / "archives.txt"), "--out", str(tmp_path / "out"), "--cores", "2"]
    assert job.main(["--job", str(tmp_path / "nowhere.py"), *words]) == 2
    assert "nowhere.py' does not exist" in capsys.readouterr().err
    assert job.main(["--job", written(tmp_path, COUNTING), *words, "--part-mb", "0"]) == 2
    assert "parameter 'part_mb'" in capsys.readouterr().err
