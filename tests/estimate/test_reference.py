"""Recorded figures: what is written is read, with where it was made, and a run that is not there is known."""

import json

import pytest

from kit.estimate import reference
from kit.lake.manifest import Counts
from kit.lake.store import Lake
from kit.params import ExploreIndex


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "FOLDER", tmp_path / "runs")
    reference.read.cache_clear()
    yield tmp_path / "runs"
    reference.read.cache_clear()


@pytest.fixture
def manifest(tmp_path):
    lake = Lake(str(tmp_path / "lake"))
    with lake.stage(ExploreIndex(run="r")) as out:
        out.bytes("part", b"1", rows=1)
        return out.commit(Counts(records_in=1, records_out=1))


@pytest.mark.parametrize("dirty", [False, True])
def test_what_is_recorded_is_read_with_machine_date_and_commit(folder, manifest, dirty: bool):
    assert not reference.recorded("speed")
    made = manifest.model_copy(
        update={"code": manifest.code | {"git_sha": "0123456789abcdef", "dirty": dirty}}
    )
    reference.write_reference("speed", made, "2 cores of A", {"rows": [{"name": "größer", "s": 1.5}]})
    assert reference.recorded("speed")
    assert reference.read("speed") == {
        "machine": "2 cores of A",
        "date": manifest.created_at[:10],
        "commit": "0123456789" + "+" * dirty,
        "rows": [{"name": "größer", "s": 1.5}],
    }
    assert "größer" in (folder / "speed.json").read_text(encoding="utf-8")


def test_a_new_recording_takes_the_place_of_what_was_read_before(folder, manifest):
    for figure in (1, 2):
        reference.write_reference("speed", manifest, "a machine", {"figure": figure})
        assert reference.read("speed")["figure"] == figure


def test_the_files_that_ship_are_written_as_they_would_be_again():
    for path in sorted(reference.FOLDER.glob("*.json")):
        text = path.read_text(encoding="utf-8")
        assert json.dumps(json.loads(text), indent=1, ensure_ascii=False) + "\n" == text, path.name
        assert {"machine", "date", "commit"} <= set(reference.read(path.stem))
