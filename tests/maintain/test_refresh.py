"""What maintainers type: words that are wrong are one line, and those that are right reach the verb they name."""

import pytest

from kit.maintain import refresh, train_blocks
from kit.train.plan import dry


@pytest.mark.parametrize(
    "main, words, said",
    [
        (refresh.main, ["refrence"], "invalid choice: 'refrence'"),
        (refresh.main, ["classify", "sample"], "required: lake, command"),
        (refresh.main, ["methods", "demo", "gpu"], "invalid choice: 'gpu'"),
        (train_blocks.main, ["a.warc.gz"], "every archive needs its gold file"),
        (train_blocks.main, [], "required: files"),
        (dry.main, ["Llama-3-8B"], "required: folder"),
    ],
)
def test_wrong_words_are_one_line_and_status_2(main, words, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, verb, told",
    [
        (["reference"], "reference", {"small": "tiny", "large": "demo"}),
        (
            ["methods", "demo", "gpu_methods"],
            "methods",
            {"run": "demo", "name": "gpu_methods"},
        ),
        (
            ["classify", "r", "l", "kit run x"],
            "classify",
            {"run": "r", "lake": "l", "command": "kit run x"},
        ),
    ],
)
def test_words_reach_the_verb_they_name(words, verb, told, monkeypatch):
    heard = []
    monkeypatch.setitem(refresh.RECORDED, verb, lambda **given: heard.append(given))
    refresh.main(words)
    assert heard == [told]


def test_numbers_of_notebooks_are_passed_on(monkeypatch):
    heard = []
    monkeypatch.setattr(refresh, "refresh_notebooks", lambda *numbers: heard.append(numbers))
    refresh.main(["notebooks", "10", "21"])
    assert heard == [("10", "21")]
