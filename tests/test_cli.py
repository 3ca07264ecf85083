"""The command line: exit status 0, 1 or 2, one clear line for a mistake, paths from the working directory."""

import os
import subprocess

import pytest

from kit import ROOT, cli, pipeline
from kit.cli import main, parser, recipe_values
from kit.lake.store import Lake
from kit.params import STAGES

DEMO = str(ROOT / "params" / "demo.yaml")
DOLLY = str(ROOT / "params" / "dolly_llama3.yaml")


@pytest.mark.parametrize(
    "words, told",
    [
        (["rum"], "no command 'rum'; did you mean 'run'"),
        (["run"], "recipe"),
        (["run", "nosuch.yaml"], "cannot read recipe"),
        (["run", DEMO, "--untl", "50"], "unrecognized arguments"),
        (["run", DEMO, "--until", "55"], "no stage '55'"),
        (["run", DEMO, "-p", "min_word=3"], "did you mean 'min_words'"),
        (["run", DEMO, "-p", "min_words"], "NAME=VALUE"),
        (["run", DEMO, "-p", "min_words=few"], "parameter 'min_words'"),
        (["estimate", DEMO, "-p", "archive_paths=[nosuch.warc.gz]"], "nosuch.warc.gz' does not exist"),
        (["run", DEMO, "-p", "index_path=nosuch"], "does not exist"),
        (["status", "nosuchrun"], "no run 'nosuchrun'"),
        (["estimate", DEMO, "--gpus", "8"], "give --gpu h100 --gpus 8"),
        (["estimate", DEMO, "--gpu", "h100", "--gpus", "0"], "all above 0"),
        (["estimate", DEMO, "--gpu", "h100", "--nodes", "2"], "give --gpu h100 --gpus 8"),
        (["estimate", DEMO, "--gpu", "h1", "--gpus", "2"], "unknown GPU 'h1'; did you mean 'h100'"),
    ],
)
def test_wrong_words_are_one_line_and_status_2(words, told, capsys):
    status = main(words)
    err = capsys.readouterr().err
    assert status == 2 and told in err and err.count("\n") == 1


def test_a_lake_that_cannot_be_written_is_status_1(capsys):
    assert main(["run", DEMO, "--lake", "/dev/null/x"]) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_without_words_help_is_shown(capsys):
    assert main([]) == 2
    out = capsys.readouterr().out
    assert all(command in out for command in cli.COMMANDS)


def test_paths_of_the_command_line_start_at_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.warc.gz", "b c.warc"):
        (tmp_path / name).touch()
    args = parser().parse_args(["run", DEMO, "-p", "archive_paths=[a.warc.gz, 'b c.warc']", "--lake", "mine"])
    values = recipe_values(args)
    for got, name in zip(
        [*values["archive_paths"], values["lake"]], ["a.warc.gz", "b c.warc", "mine"], strict=True
    ):
        assert os.path.samefile(tmp_path, ROOT / os.path.dirname(got)) and os.path.basename(got) == name


def test_a_url_stays_a_url(monkeypatch):
    args = parser().parse_args(["run", DEMO, "--lake", "s3://bucket/lake"])
    assert recipe_values(args)["lake"] == "s3://bucket/lake"


def test_the_recipe_names_the_run_and_the_command_line_wins():
    assert recipe_values(parser().parse_args(["run", DEMO]))["run"] == "demo"
    assert recipe_values(parser().parse_args(["run", DEMO, "-p", "run=real"]))["run"] == "real"


def test_an_empty_archive_is_one_line_and_nothing_is_done(tmp_path, capsys):
    (tmp_path / "empty.warc.gz").touch()
    words = [
        "-p",
        f"archive_paths=[{tmp_path}/empty.warc.gz]",
        "--lake",
        str(tmp_path / "lake"),
        "--only",
        "10",
    ]
    assert main(["run", DEMO, *words]) == 1
    err = capsys.readouterr().err
    assert "empty file" in err and err.count("\n") == 1
    assert main(["status", "demo", "--lake", str(tmp_path / "lake")]) == 2, "no stage of it counts as done"


def test_a_full_disk_is_one_line_and_nothing_is_done(tmp_path, capfd):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", disk], check=False, capture_output=True
    ).returncode:
        pytest.skip("may not mount a small file system here")
    try:
        assert main(["run", DEMO, "--lake", str(disk), "--from", "10", "--until", "20"]) == 1
        err = capfd.readouterr().err
        assert "disk is full" in err and err.count("\n") == 1
        assert Lake(str(disk)).manifest("demo", "20_extract_text") is None
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_ctrl_c_is_no_traceback(monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run_stages", stop)
    assert main(["run", DEMO]) == 1
    assert "run again to go on" in capsys.readouterr().err


def test_estimate_covers_every_stage(capsys, tmp_path):
    assert main(["estimate", DEMO, "--lake", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in STAGES) and "pages selected" in out and "reference run" in out


def test_estimate_for_several_gpus_adds_two_tables_and_changes_nothing_else(capsys, tmp_path):
    words = ["estimate", DOLLY, "--lake", str(tmp_path), "--gpu", "h100"]
    assert main(words) == 0
    alone = capsys.readouterr().out
    assert main([*words, "--gpus", "8", "--nodes", "4"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(alone) and max(map(len, out.splitlines())) < 110
    memory, steps = out.removeprefix(alone).strip().split("\n\n")
    assert "12 rows of 1,024 tokens a step on 4 × 8 H100 SXM" in memory
    assert "32 cannot share 8 KV heads; 8 can" in memory and "20 GPUs without a row" in memory
    for way in ("one GPU", "DDP", "FSDP2 (ZeRO-3)", "pipeline", "tensor 8 × DDP 4", "tensor 8 × FSDP2 4"):
        assert f"\n{way} " in memory and f"\n{way} " in steps
    assert "\ntensor  " not in steps and "bubble (s-1)/" in steps


def test_status_of_an_empty_lake(capsys, tmp_path):
    assert main(["status", "--lake", str(tmp_path)]) == 0
    assert "no run" in capsys.readouterr().out


def test_doctor_says_what_will_work(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "Java" in out and "SmolLM2" in out and "memory" in out
