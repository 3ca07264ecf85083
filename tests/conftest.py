"""What several tests share: the sample crawl, what is planted in it, and one small lake with stages 10–50 run."""

import json
from collections import defaultdict
from pathlib import Path

import pytest

from kit import ROOT
from kit.lake import Lake
from kit.params import BuildDatasets, Deduplicate, ExploreIndex, ExtractText, RefineText

SAMPLE = ROOT / "data_samples"
REAL = ROOT.parent / "shared" / "data"
CRAWL = "CC-SAMPLE-2026-05"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Real third-party archives; tests that want them are skipped where there are none."""
    if not REAL.is_dir():
        pytest.skip(f"no real test data in {REAL}")
    return REAL


@pytest.fixture(scope="session")
def crawl_planted() -> dict[str, list[dict]]:
    """What is planted in the newer sample crawl, by property."""
    found = defaultdict(list)
    for line in (SAMPLE / "planted.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["crawl"] == CRAWL:
            found[record["property"]].append(record)
    return found


@pytest.fixture(scope="session")
def data_lake(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    """A lake whose run `sample` has stages 10–50 of the sample crawl, all with their defaults. Read only."""
    lake = Lake(str(tmp_path_factory.mktemp("lake")))
    run_data_stages(lake, "sample", cores=2)
    return lake


def run_data_stages(lake: Lake, run: str, until: str = "50", **values) -> None:
    """Stages 10–50 (or up to `until`) in this process; each stage takes those of `values` that it knows."""
    from kit.data.datasets import build_datasets
    from kit.data.dedup import deduplicate
    from kit.data.extract import extract_text
    from kit.data.index import explore_index
    from kit.data.refine import refine_documents

    steps = (
        (ExploreIndex, explore_index),
        (ExtractText, extract_text),
        (RefineText, refine_documents),
        (Deduplicate, deduplicate),
        (BuildDatasets, build_datasets),
    )
    for cls, stage in steps:
        if cls.stage[:2] <= until and not lake.manifest(run, cls.stage):
            known = {k: v for k, v in values.items() if k in cls.model_fields}
            stage(cls(run=run, lake=lake.uri, **known), lake)


@pytest.fixture(scope="session")
def documents(data_lake: Lake) -> dict[str, dict]:
    """Extracted documents of the sample crawl by URL."""
    return _by_url(data_lake, "20_extract_text")


@pytest.fixture(scope="session")
def refined(data_lake: Lake) -> dict[str, dict]:
    """Refined documents of the sample crawl by URL."""
    return _by_url(data_lake, "30_refine_text")


def _by_url(lake: Lake, stage: str) -> dict[str, dict]:
    return {d["url"]: d for d in lake.table(lake.need("sample", stage)).to_pylist()}
