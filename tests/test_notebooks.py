"""Committed notebooks: thin, clean, with outputs, and in step with `kit.params`. nbval runs them (`make test`)."""

import ast
import json
import re

import pytest

from kit import ROOT, params

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# a machine's own paths and hosts have no business in a committed output
MACHINE = re.compile(r"/(home|root|Users|tmp|work|opt)/|[A-Z]:\\\\")


@pytest.fixture(params=NOTEBOOKS, ids=lambda f: f.stem)
def notebook(request):
    made = json.loads(request.param.read_text(encoding="utf-8"))
    made["stem"] = request.param.stem
    return made


def code(notebook):
    return [("".join(c["source"]), c) for c in notebook["cells"] if c["cell_type"] == "code"]


def test_every_stage_has_its_notebook():
    assert [f.stem for f in NOTEBOOKS] == sorted(params.NOTEBOOKS)


def test_parameters_cell_repeats_the_defaults(notebook):
    tagged = [s for s, c in code(notebook) if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1
    tree = ast.parse(tagged[0])
    assert all(isinstance(n, ast.Assign) for n in tree.body)
    values = {n.targets[0].id: ast.literal_eval(n.value) for n in tree.body}
    defaults = {k: f.default for k, f in params.NOTEBOOKS[notebook["stem"]].model_fields.items()}
    assert values == defaults
    assert {k: type(v) for k, v in values.items()} == {k: type(v) for k, v in defaults.items()}


def test_cells_are_thin_and_define_nothing(notebook):
    for source, cell in code(notebook):
        assert "parameters" in cell["metadata"].get("tags", []) or source.count("\n") < 16
        # 21 is about a function that a person writes: into a file of its own
        if not source.startswith("%%writefile jobs/my_"):
            assert not re.search(r"^\s*(def|class) |pip install|^!", source, re.MULTILINE)


def test_metadata_is_clean(notebook):
    assert notebook["metadata"] == {
        "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    assert all(set(c["metadata"]) <= {"tags"} for c in notebook["cells"])


def test_outputs_are_there_and_clean(notebook):
    outputs = [o for _, c in code(notebook) for o in c["outputs"]]
    assert len(outputs) >= 3, "committed without outputs: make notebooks"
    for output in outputs:
        assert output["output_type"] != "error"
        assert "application/vnd.jupyter.widget-view+json" not in output.get("data", {})
        text = json.dumps({k: v for k, v in output.get("data", {}).items() if k != "image/png"}) + str(
            output.get("text")
        )
        assert not MACHINE.search(text), MACHINE.search(text)


def test_size_and_checked_cell(notebook):
    assert len(json.dumps(notebook)) <= 300_000
    checked = [c for s, c in code(notebook) if s.startswith("# NBVAL_CHECK_OUTPUT")]
    assert len(checked) == 1 and checked[0]["outputs"]


def test_the_first_cell_is_a_card(notebook):
    first = "".join(notebook["cells"][0]["source"])
    assert (
        first.startswith(f"# {notebook['stem'][:2]} · ")
        and "| reads | writes | time | memory | cost | before | after |" in first
    )
