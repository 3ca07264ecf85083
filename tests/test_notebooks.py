"""Notebooks: thin, clean, in step with `kit.params`, their outputs made by today's code; and all of them run.

The main chain runs once, by papermill (the fixture `chain`); the side trips run under nbval on the chain's lake. Those
that only count data run with their defaults, so their checked output must be the committed one. Those that train run
with the few steps of `params/smoke.yaml` as long as their committed outputs were made by the code that stands here
(`make notebooks` leaves its hash in their metadata); where the code has changed since, nbval runs them whole.
"""

import ast
import copy
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from nbclient import NotebookClient
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from kit import ROOT, params
from kit.lake.code import source_sha256

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


def test_cells_are_thin(notebook):
    for source, cell in code(notebook):
        assert "parameters" in cell["metadata"].get("tags", []) or source.count("\n") < 16
        # 21 is about a function that a person writes: into a file of its own
        if not source.startswith("%%writefile jobs/my_"):
            assert not re.search(r"^\s*class |pip install|^!", source, re.MULTILINE)
            # a lambda with a name is a def that is harder to read and to find in a traceback
            assert not re.search(r"^\w+ = lambda\b", source, re.MULTILINE)


def test_metadata_is_clean(notebook):
    assert re.fullmatch("[0-9a-f]{64}", notebook["metadata"].pop("outputs_of"))
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


def assigned(source: str) -> set[str]:
    """Names that running a cell gives a value to: assignments, loops, `with … as`, `:=`, imports, functions."""
    if source.startswith("%%"):  # a cell magic's body is not this notebook's code
        return set()
    names = set()
    todo = list(ast.parse(re.sub(r"^[%!].*$", "", source, flags=re.MULTILINE)).body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.alias):
            names.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
            continue  # what is assigned inside stays inside
        elif isinstance(node, ast.ExceptHandler) and node.name:
            names.add(node.name)
        todo += ast.iter_child_nodes(node)
    return names


@pytest.mark.parametrize(
    "source",
    [
        "lake = 1",
        "a, (b, lake) = x",
        "lake: int = 1",
        "lake += 1",
        "for lake in x: pass",
        "with open(x) as lake: pass",
        "f(lake := 1)",
        "import lake.store",
        "from a import b as lake",
        "def lake(): pass",
        "if x:\n    lake = 1",
    ],
)
def test_every_way_to_assign_a_name_is_seen(source):
    assert "lake" in assigned(source)
    assert "lake" not in assigned("def f(lake):\n    lake = 1\ng(lake=lambda lake: lake.x)\nlake.x = 1")


def test_no_cell_assigns_a_parameter(notebook):
    """A cell that does cannot be run again: the parameters cell would be read back with what it left."""
    parameters = set(params.NOTEBOOKS[notebook["stem"]].model_fields)
    for source, cell in code(notebook):
        if "parameters" not in cell["metadata"].get("tags", []):
            assert not assigned(source) & parameters


def test_every_cell_can_be_run_again(tmp_path):
    notebook = nbformat.read(ROOT / "notebooks" / "10_explore_index.ipynb", as_version=4)
    (given,) = [c for c in notebook.cells if "parameters" in c["metadata"].get("tags", [])]
    given.source += f"\nlake = {str(tmp_path / 'lake')!r}"
    # the parameters cell stays out of the second round: it would put right what the others spoilt
    again = copy.deepcopy([c for c in notebook.cells if c is not given])
    for i, cell in enumerate(again):
        cell.id = f"again-{i}"
    notebook.cells += again
    NotebookClient(
        notebook, kernel_name="python3", resources={"metadata": {"path": str(ROOT / "notebooks")}}
    ).execute()
    assert (tmp_path / "lake/intermediate/sample/10_explore_index/_manifest.json").exists()


SMOKE = yaml.safe_load((ROOT / "params" / "smoke.yaml").read_text(encoding="utf-8"))
DATA = [stem for stem in params.NOTEBOOKS if stem < "60"]


def checked_text(notebook: dict) -> list[str]:
    """What the cell that nbval checks shows."""
    (cell,) = [c for s, c in code(notebook) if s.startswith("# NBVAL_CHECK_OUTPUT")]
    return ["".join(o.get("text", o.get("data", {}).get("text/plain", ""))) for o in cell["outputs"]]


@pytest.mark.parametrize("stem", [stem for stem in params.STAGES if stem in DATA])
def test_the_chain_shows_what_is_committed(chain, stem):
    executed = Path(chain.lake.root, "reports", chain.run, "notebooks", f"{stem}.ipynb")
    committed = (ROOT / "notebooks" / f"{stem}.ipynb").read_text(encoding="utf-8")
    assert checked_text(json.loads(executed.read_text(encoding="utf-8"))) == checked_text(
        json.loads(committed)
    )


def nbval_parameters(stem: str) -> dict | None:
    """Parameters, beside the defaults, under which nbval is to run a notebook; None where it need not."""
    committed = json.loads((ROOT / "notebooks" / f"{stem}.ipynb").read_text(encoding="utf-8"))
    if stem in DATA or committed["metadata"]["outputs_of"] != source_sha256(stem):
        return {}
    known = params.NOTEBOOKS[stem].model_fields
    return None if stem in params.STAGES else {k: v for k, v in SMOKE.items() if k in known and k != "run"}


@pytest.mark.timeout(3000)  # a slow machine, and a notebook that runs whole
@pytest.mark.parametrize("stem", [s for s in params.NOTEBOOKS if s not in DATA or s in params.SIDE_TRIPS])
def test_nbval(chain, stem, tmp_path):
    values = nbval_parameters(stem)
    if values is None:
        pytest.skip("unchanged since its outputs were made, and the chain has run it with fewer steps")
    lake = shutil.copytree(chain.lake.root, tmp_path / "lake")
    notebook = parameterize_notebook(
        load_notebook_node(str(ROOT / "notebooks" / f"{stem}.ipynb")), {**values, "lake": str(lake)}
    )
    if values:  # other counts than the committed ones: every cell must run, none is compared
        for cell in notebook.cells:
            cell.source = cell.source.removeprefix("# NBVAL_CHECK_OUTPUT\n")
    here = tmp_path / f"{stem}.ipynb"
    nbformat.write(notebook, here)
    (tmp_path / "jobs").symlink_to(ROOT / "notebooks" / "jobs")  # 21 writes a job there and reads it again
    words = ["-q", "--nbval-lax", "-c", os.devnull, "--rootdir", tmp_path, "-p", "no:cacheprovider", here]
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words],
        cwd=tmp_path, env=env | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
