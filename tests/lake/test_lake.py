"""The lake: the manifest is the commit, nothing half-written counts, records add up."""

import json
import os
import pickle
import subprocess
import sys

import fsspec
import pyarrow as pa
import pytest

from kit.errors import LakeError, MissingInput, ParamError
from kit.lake import code as code_module
from kit.lake import store as lake_module
from kit.lake.code import _module_path, source_sha256
from kit.lake.files import fingerprint
from kit.lake.manifest import Account, Counts
from kit.lake.store import Lake
from kit.params import ExploreIndex, ExtractText, RefineText

TABLE = pa.table({"x": [1, 2, 3]})


def commit(lake, table=TABLE, **params):
    with lake.stage(ExploreIndex(run="r", **params)) as out:
        out.table("part-00000", table)
        return out.commit(Counts(records_in=table.num_rows, records_out=table.num_rows))


@pytest.fixture
def lake(tmp_path):
    return Lake(str(tmp_path / "lake"))


def test_what_is_committed_is_read(lake):
    manifest = commit(lake)
    assert lake.need("r", "10_explore_index") == manifest
    assert lake.table(manifest).equals(TABLE)


def test_records_must_add_up():
    Counts(records_in=5, created=2, records_out=4, dropped={"a": 2}, failed={"b": 1})
    with pytest.raises(ValueError, match="do not add up"):
        Counts(records_in=5, records_out=4)


def test_accounts_of_parts_add_up_to_one_of_the_whole():
    judged = Account.of_verdicts(["too short", None, None, "too long", "too short"])
    assert (judged.records_in, judged.records_out) == (5, 2)
    other = Account(4, created=1, records_out=3, failed={"timeout": 2})
    counts = Account.total([judged, other]).counts()
    assert (counts.records_in, counts.created, counts.records_out) == (9, 1, 5)
    assert list(counts.dropped.items()) == [("too long", 1), ("too short", 2)], (
        "by name: parts end in any order"
    )
    assert counts.failed == {"timeout": 2} and judged.failed == {}, "and the parts' own are left as they were"
    assert list(judged.counts(by_name=False).dropped) == ["too short", "too long"]
    with pytest.raises(ValueError, match="do not add up"):
        Account(5, records_out=4).counts()


def test_a_part_is_written_and_read_by_another_process(lake, tmp_path):
    """Spark's workers import the kit and are sent a writer and a lake."""
    with lake.stage(ExploreIndex(run="r")) as out:
        (tmp_path / "sent").write_bytes(pickle.dumps((out.parts, lake)))
        code = (
            "import pickle, sys, pyarrow as pa\n"
            "writer, lake = pickle.load(open(sys.argv[1], 'rb'))\n"
            "made = [writer.table('part-00000', pa.table({'x': [1, 2, 3]})) for _ in range(2)]\n"
            "assert lake.read_part(f'{writer.folder}/{made[0].path}', ['x']).num_rows == 3\n"
            "pickle.dump(made, sys.stdout.buffer)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "sent")], capture_output=True, check=True
        )
        first, retried = pickle.loads(done.stdout)
        assert first.path != retried.path and first.sha256 == retried.sha256, (
            "a retried task overwrites nothing"
        )
        out.add(retried)
        manifest = out.commit(Counts(records_in=3, records_out=3))
    assert lake.table(manifest).equals(TABLE)
    assert len(lake.fs.find(lake.folder("r", "10_explore_index"))) == 2, "the other one is swept"


@pytest.mark.parametrize(
    ("changed", "same"),
    [({}, True), ({"min_lang_score": 0.9}, True), ({"mask_pii": False}, False), ({"cores": 1}, True)],
)
def test_work_is_the_same_by_parameters_inputs_and_code(lake, changed, same):
    commit(lake)
    with lake.stage(RefineText(run="r")) as out:
        out.read("10_explore_index")
        out.table("part-00000", TABLE)
        last = out.commit(Counts(records_in=3, records_out=3))
    with lake.stage(RefineText(run="r", **changed)) as out:
        assert not out.same_work(last, but={"min_lang_score"}), "its input is not noted yet"
        out.read("10_explore_index")
        assert out.same_work(last, but={"min_lang_score"}) == same
        other_code = last.model_copy(update={"code": last.code | {"source_sha256": "0"}})
        assert not out.same_work(other_code, but={"min_lang_score"})
        out.table("part-00000", TABLE)
        out.commit(Counts(records_in=3, records_out=3))


def test_without_a_commit_nothing_happened(lake):
    first = commit(lake)
    with pytest.raises(RuntimeError), lake.stage(ExploreIndex(run="r")) as out:
        out.table("part-00000", pa.table({"x": [9]}))
        raise RuntimeError("killed")
    assert lake.table(lake.need("r", "10_explore_index")).equals(TABLE)
    assert lake.need("r", "10_explore_index") == first


def test_ending_without_a_commit_is_an_error(lake):
    with pytest.raises(LakeError, match="without a commit"), lake.stage(ExploreIndex(run="r")) as out:
        out.table("part-00000", TABLE)


def test_an_empty_result_is_a_failure(lake):
    with (
        pytest.raises(LakeError, match=r"yielded nothing: 4 in, 0 out \(4 too short\)"),
        lake.stage(ExploreIndex(run="r")) as out,
    ):
        out.table("part-00000", TABLE)
        out.commit(Counts(records_in=4, records_out=0, dropped={"too short": 4}))
    assert lake.manifest("r", "10_explore_index") is None


def test_content_hash_does_not_depend_on_the_attempt(lake):
    a, b = commit(lake), commit(lake)
    assert a.content_sha256 == b.content_sha256
    assert [o.path for o in a.outputs] != [o.path for o in b.outputs]
    assert commit(lake, pa.table({"x": [1]})).content_sha256 != a.content_sha256


def test_measurements_are_no_part_of_the_content(lake):
    hashes = set()
    for seconds in (1.0, 2.0):
        with lake.stage(ExploreIndex(run="r")) as out:
            out.table("part-00000", TABLE)
            out.table("timing", pa.table({"s": [seconds]}), measured=True)
            hashes.add(out.commit(Counts(records_in=3, records_out=3)).content_sha256)
    assert len(hashes) == 1


def test_leftovers_of_killed_attempts_go_with_the_next_commit(lake):
    commit(lake)
    folder = lake.folder("r", "10_explore_index")
    for name in ("part-00000-dead.parquet", "_manifest.json.half"):
        lake.fs.pipe_file(f"{folder}/{name}", b"half")
    last = commit(lake)
    names = {os.path.basename(f) for f in lake.fs.find(folder)}
    assert not {n for n in names if "dead" in n or "half" in n}
    assert {o.path for o in last.outputs} <= names


def test_a_reader_of_the_previous_result_keeps_it(lake):
    before = commit(lake)
    commit(lake)
    assert lake.table(before).equals(TABLE)


def test_inputs_are_recorded_by_content(lake):
    source = commit(lake)
    with lake.stage(ExtractText(run="r")) as out:
        out.read("10_explore_index")
        out.table("part-00000", TABLE)
        manifest = out.commit(Counts(records_in=3, records_out=3))
    assert manifest.inputs[0].uri == "intermediate/r/10_explore_index"
    assert manifest.inputs[0].content_sha256 == source.content_sha256


def test_a_missing_input_says_how_to_make_it(lake):
    with pytest.raises(MissingInput, match="--until 10"), lake.stage(ExtractText(run="r")) as out:
        out.read("10_explore_index")


@pytest.mark.parametrize("text", ["", "{", "{}", '{"stage": 1}'])
def test_a_damaged_manifest_is_told(lake, text):
    commit(lake)
    lake.fs.pipe_file(f"{lake.folder('r', '10_explore_index')}/_manifest.json", text.encode())
    with pytest.raises(LakeError, match="is not a manifest"):
        lake.need("r", "10_explore_index")


def test_a_missing_part_is_told(lake):
    manifest = commit(lake)
    lake.fs.rm_file(lake.paths(manifest)[0])
    with pytest.raises(LakeError, match="cannot read 10_explore_index"):
        lake.table(manifest)


@pytest.mark.parametrize("uri", ["/dev/null/x", "/proc/nothing/x"])
def test_a_lake_that_cannot_be_written_is_one_line(uri):
    with pytest.raises(LakeError, match="cannot be written") as error:
        Lake(uri).check_writable()
    assert "\n" not in str(error.value)


def test_an_unknown_protocol_is_one_line():
    with pytest.raises(LakeError, match="cannot open lake"):
        Lake("nosuch://bucket")


def test_a_full_disk_is_one_line_and_no_commit(tmp_path):
    """A limit on file size stands in for a full disk: the system refuses the write in the same place."""
    code = (
        "import resource, signal, pyarrow as pa, numpy as np\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "from kit.lake.files import LakeError; from kit.lake.manifest import Counts; from kit.lake.store import Lake\n"
        "from kit.params import ExploreIndex\n"
        f"lake = Lake({str(tmp_path)!r})\n"
        "try:\n"
        "    with lake.stage(ExploreIndex(run='r')) as out:\n"
        "        out.table('part-00000', pa.table({'x': np.random.default_rng(0).random(100_000)}))\n"
        "        out.commit(Counts(records_in=1, records_out=1))\n"
        "except LakeError as error:\n"
        "    print(error, lake.manifest('r', '10_explore_index'))\n"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "the disk is full None" in told


def test_a_folder_is_kept_as_a_folder(lake, tmp_path):
    model = tmp_path / "m"
    (model / "sub").mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (model / "sub" / "w.bin").write_bytes(b"1")
    with lake.stage(ExploreIndex(run="r")) as out:
        out.folder("model", model)
        manifest = out.commit(Counts(records_in=1, records_out=1))
    local = lake.local_folder(manifest, "model")
    assert sorted(os.listdir(local)) == ["config.json", "sub"]


def test_runs_are_listed(lake):
    assert lake.runs() == []
    commit(lake)
    assert lake.runs() == ["r"]


def test_fingerprint_follows_the_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"1")
    one = fingerprint(str(tmp_path))
    assert fingerprint(str(tmp_path)) == one
    (tmp_path / "a").write_bytes(b"2")
    assert fingerprint(str(tmp_path)) != one
    with pytest.raises(ParamError, match="does not exist"):
        fingerprint(str(tmp_path / "none"))


def test_source_hash_sees_code_and_not_parameters(tmp_path, monkeypatch):
    notebook = {"cells": [
        {"cell_type": "code", "source": "x = 1", "metadata": {"tags": ["parameters"]}},
        {"cell_type": "code", "source": "from kit.data.refine import quality", "metadata": {}},
    ]}  # fmt: skip
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "kit" / "data" / "refine").mkdir(parents=True)
    (tmp_path / "kit" / "data" / "refine" / "quality.py").write_text("A = 1")
    monkeypatch.setattr(code_module, "ROOT", tmp_path)
    monkeypatch.setattr(lake_module, "ROOT", tmp_path)
    _module_path.cache_clear()

    def now():
        (tmp_path / "notebooks" / "10_x.ipynb").write_text(json.dumps(notebook))
        return source_sha256("10_x")

    first = now()
    notebook["cells"][0]["source"] = "x = 2"
    assert now() == first
    (tmp_path / "kit" / "data" / "refine" / "quality.py").write_text("A = 2")
    assert now() != first
    _module_path.cache_clear()


def test_a_lake_on_s3_works_alike(s3):
    lake = Lake(s3)
    lake.check_writable()
    first = commit(lake)
    again = commit(lake, pa.table({"x": [4]}))
    assert lake.table(lake.need("r", "10_explore_index")).to_pydict() == {"x": [4]}
    assert lake.table(first).equals(TABLE), "a reader of the previous result keeps it"
    assert lake.runs() == ["r"] and again.content_sha256 != first.content_sha256


def test_a_store_that_is_not_there_is_one_line(s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    lake = Lake("s3://nobody/lake")
    lake.fs = fsspec.filesystem("s3", skip_instance_cache=True)
    for look in (lake.check_writable, lake.runs, lambda: lake.manifest("r", "10_explore_index")):
        with pytest.raises(LakeError, match=r"cannot be (written|read)|cannot read") as error:
            look()
        assert "\n" not in str(error.value)


def test_a_model_on_s3_comes_back_as_a_folder(s3, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    lake = Lake(s3)
    with lake.stage(ExtractText(run="m")) as out:
        out.folder("model", tmp_path)
        manifest = out.commit(Counts(records_in=1, records_out=1))
    assert os.listdir(lake.local_folder(manifest, "model")) == ["config.json"]


def test_rows_of_which_the_first_failed_keep_the_columns_of_the_others(lake):
    rows = [{"name": "a", "error": "no memory"}, {"name": "b", "error": "", "seconds": 2.5}]
    with lake.stage(ExploreIndex(run="r")) as out:
        out.rows("table", rows, measured=True)
        manifest = out.commit(Counts(records_in=2, records_out=2))
    table = lake.table(manifest, "table")
    assert table.to_pylist() == [rows[0] | {"seconds": None}, rows[1]]
    assert manifest.outputs[0].measured
    with lake.stage(ExploreIndex(run="r")) as out:
        out.rows("table", rows, pa.schema([("seconds", pa.float64())]))
        named = out.commit(Counts(records_in=2, records_out=2))
    assert lake.table(named, "table").column_names == ["seconds"]


STAGE = "r", "10_explore_index"


def test_the_record_of_a_try_is_not_swept_and_holds_for_its_commit_alone(lake):
    commit(lake)
    lake.record_execution(*STAGE, seconds=2.5, peak_memory_mb=300)
    record = lake.execution(*STAGE)
    assert (record.seconds, record.peak_memory_mb, record.error) == (2.5, 300, None)
    assert record.commit == lake.commit_sha256(*STAGE)
    path = f"{lake.folder(*STAGE)}/{lake_module.EXECUTION}"
    before = lake.fs.cat_file(path)
    commit(lake)
    assert lake.fs.cat_file(path) == before, "the next commit sweeps it or writes into it"
    assert lake.execution(*STAGE).seconds is None, "it tells of another commit"
    lake.record_execution(*STAGE, seconds=1.0)
    assert lake.execution(*STAGE).peak_memory_mb is None, "from the record of another commit"


def test_a_failure_leaves_what_the_last_good_result_took(lake):
    lake.record_execution(*STAGE, error="no luck")
    assert lake.execution(*STAGE).error == "no luck" and lake.manifest(*STAGE) is None
    commit(lake)
    assert lake.execution(*STAGE).error is None
    lake.record_execution(*STAGE, seconds=2.5)
    lake.record_execution(*STAGE, error="no luck")
    record = lake.execution(*STAGE)
    assert (record.seconds, record.error) == (2.5, "no luck")


@pytest.mark.parametrize("text", ["", "{", '{"seconds": 3}', '{"commit": null, "seconds": "x"}'])
def test_a_damaged_record_of_a_try_is_none(lake, text):
    commit(lake)
    lake.fs.pipe_file(f"{lake.folder(*STAGE)}/{lake_module.EXECUTION}", text.encode())
    assert lake.execution(*STAGE).seconds is None
