"""The chain: done, stale and failed are told apart, and a notebook that breaks is one clear line."""

import nbformat
import pyarrow as pa
import pytest

from kit import pipeline, report
from kit.errors import ParamError, StageFailed
from kit.lake.manifest import Counts
from kit.lake.store import Lake
from kit.params import STAGES, for_stage
from kit.pipeline import pick, run_stage, states

VALUES = {"run": "r"}


@pytest.fixture
def lake(tmp_path):
    return Lake(str(tmp_path / "lake"))


def make(lake, name, x=1, **values):
    """Commit a stand-in result of a stage, reading what the stage reads."""
    p = for_stage(STAGES[name], {**VALUES, **values})
    with lake.stage(p) as out:
        for need in p.needs:
            out.read(need)
        out.table("part-00000", pa.table({"x": [x]}))
        return out.commit(Counts(records_in=1, records_out=1))


def make_all(lake):
    for name in STAGES:
        make(lake, name)


def not_done(lake, **values):
    found = states(lake, {**VALUES, "lake": lake.uri, **values})
    return {s.stage[:2]: s.why for s in found if s.status != "done"}


def test_a_fresh_lake_misses_everything_and_a_made_one_nothing(lake):
    assert {s.status for s in states(lake, {**VALUES, "lake": lake.uri})} == {"missing"}
    make_all(lake)
    assert not_done(lake) == {}


def test_a_parameter_makes_its_stage_and_those_after_stale(lake):
    make_all(lake)
    stale = not_done(lake, min_jaccard=0.8)
    assert list(stale) == ["40", "50", "60", "70", "80", "90"]
    assert stale["40"] == "changed: parameter min_jaccard" and stale["50"] == "after 40_deduplicate"


def test_a_training_parameter_leaves_the_data_alone(lake):
    make_all(lake)
    assert list(not_done(lake, dpo_beta=0.2)) == ["70", "80", "90"]


def test_where_and_at_what_price_makes_nothing_stale(lake):
    make_all(lake)
    assert not_done(lake, usd_per_hour=9.0, cores=7) == {}


def test_an_input_with_new_content_makes_its_readers_stale(lake):
    make_all(lake)
    make(lake, "40_deduplicate", x=1)
    assert not_done(lake) == {}, "the same content again is no change"
    make(lake, "40_deduplicate", x=2)
    assert not_done(lake)["50"] == "changed: input intermediate/r/40_deduplicate"


def test_changed_code_makes_stale(lake, monkeypatch):
    make_all(lake)
    monkeypatch.setattr(pipeline, "code_identity", _other_code_for("80_benchmark_training"))
    assert not_done(lake) == {"80": "changed: code"}


def _other_code_for(name):
    real = pipeline.code_identity
    return lambda stage: {"source_sha256": "new"} if stage == name else real(stage)


def test_a_failure_is_told_until_the_stage_is_committed(lake):
    make_all(lake)
    lake.record_execution("r", "30_refine_text", error="out of luck")
    assert not_done(lake)["30"] == "out of luck"
    make(lake, "30_refine_text")
    assert not_done(lake) == {}


def test_stages_are_picked_by_number():
    assert pick("40", "60", None) == ["40_deduplicate", "50_build_datasets", "60_finetune_sft"]
    assert pick(None, None, "20_extract_text") == ["20_extract_text"]
    assert pick(None, None, None) == list(STAGES)
    for words in (("45", None, None), (None, "x", None), ("60", "40", None)):
        with pytest.raises(ParamError):
            pick(*words)


def notebook(folder, source):
    """A stand-in for the notebook of stage 10."""
    made = nbformat.v4.new_notebook()
    made.cells = [nbformat.v4.new_code_cell("run = lake = ''")]
    made.cells[0].metadata["tags"] = ["parameters"]
    made.cells.append(nbformat.v4.new_code_cell(source))
    made.metadata["kernelspec"] = {"name": "python3", "display_name": "", "language": "python"}
    nbformat.write(made, folder / "10_explore_index.ipynb")


@pytest.mark.parametrize(
    "source, told",
    [
        ("raise ValueError('two\\nlines')", "ValueError: two lines"),
        ("import os; os._exit(9)", "failed"),
        ("x = 1", "ended without a new result"),
    ],
)
def test_a_broken_notebook_is_one_line_and_leaves_the_last_good_result(
    lake, tmp_path, monkeypatch, source, told
):
    good = make(lake, "10_explore_index")
    notebook(tmp_path, source)
    monkeypatch.setattr(pipeline, "FOLDER", tmp_path)
    p = for_stage(STAGES["10_explore_index"], {**VALUES, "lake": lake.uri})
    with pytest.raises(StageFailed, match=told) as error:
        run_stage(lake, p)
    assert "\n" not in str(error.value) and error.value.exit_status == 1
    assert lake.manifest("r", "10_explore_index") == good
    assert lake.execution("r", "10_explore_index").error
    assert lake.fs.exists(f"{lake.root}/reports/r/notebooks/10_explore_index.ipynb")


def test_the_report_of_a_run_is_a_page(lake):
    make_all(lake)
    path = report.write_report(lake, "r", states(lake, {**VALUES, "lake": lake.uri}))
    text = lake.fs.cat_file(path).decode()
    assert text.startswith("<!doctype html>") and all(name in text for name in STAGES)


COMMITS = """
from kit.lake.manifest import Counts
from kit.lake.store import Lake
from kit.params import ExploreIndex

p = ExploreIndex.from_cell({"run": run, "lake": lake})
with Lake(p.lake).stage(p) as out:
    out.bytes("page.txt", b"x")
    out.commit(Counts(records_in=1, records_out=1))
"""


def test_what_a_run_took_is_told_until_another_commit(lake, tmp_path, monkeypatch):
    notebook(tmp_path, COMMITS)
    monkeypatch.setattr(pipeline, "FOLDER", tmp_path)
    values = {**VALUES, "lake": lake.uri}
    run_stage(lake, for_stage(STAGES["10_explore_index"], values))
    took = lake.execution("r", "10_explore_index")
    assert took.seconds > 0 and took.peak_memory_mb > 10 and took.error is None

    def row():
        return report.stage_table(lake, "r", states(lake, values)).rows[1]

    assert row()["stage"] == "10_explore_index"
    assert (row()["seconds"], row()["MB"]) == (took.seconds, took.peak_memory_mb)
    make(lake, "10_explore_index")  # by hand, as Run All does
    assert row()["seconds"] < took.seconds and row()["MB"] is None
