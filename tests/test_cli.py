"""The command line: exit status 0, 1 or 2, one clear line for a mistake, paths from the working directory."""

import os

import pytest

from kit import ROOT, cli, pipeline
from kit.cli import main, parser, recipe_values
from kit.params import STAGES

DEMO = str(ROOT / "params" / "demo.yaml")


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
        (["estimate", DEMO, "-p", "archive_paths=[nosuch.warc.gz]"], "does not exist"),
        (["status", "nosuchrun"], "no run 'nosuchrun'"),
    ],
)
def test_wrong_words_are_one_line_and_status_2_or_1(words, told, capsys):
    status = main(words)
    err = capsys.readouterr().err
    assert status in (1, 2) and told in err and err.count("\n") == 1
    assert status == 2 or "does not exist" in told


def test_a_lake_that_cannot_be_written_is_status_1(capsys):
    assert main(["run", DEMO, "--lake", "/dev/null/x"]) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_without_words_help_is_shown(capsys):
    assert main([]) == 2
    out = capsys.readouterr().out
    assert all(command in out for command in cli.COMMANDS)


def test_paths_of_the_command_line_start_at_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
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


def test_ctrl_c_is_no_traceback(monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run", stop)
    assert main(["run", DEMO]) == 1
    assert "run again to go on" in capsys.readouterr().err


def test_estimate_covers_every_stage(capsys, tmp_path):
    assert main(["estimate", DEMO, "--lake", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in STAGES) and "pages selected" in out and "reference run" in out


def test_status_of_an_empty_lake(capsys, tmp_path):
    assert main(["status", "--lake", str(tmp_path)]) == 0
    assert "no run" in capsys.readouterr().out


def test_doctor_says_what_will_work(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "Java" in out and "SmolLM2" in out and "memory" in out
