"""What maintainers run after a change: the notebooks' committed outputs and the reference rates.

`make notebooks` and `make reference` call this module; nothing else in the kit does.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from kit import process
from kit.estimate import reference
from kit.estimate.rates import two_point_rates
from kit.lake.code import source_sha256
from kit.lake.store import Lake
from kit.measure.training import compare_methods
from kit.params import NOTEBOOKS, STAGES
from kit.pipeline import FOLDER
from kit.process import stderr_to


def refresh_notebooks(*numbers: str) -> None:
    """Run the notebooks of `numbers` (none: those whose code has changed) on their defaults; write their outputs, cleaned.

    `outputs_of` in a notebook's metadata is the hash of the code that made its outputs; `make test` runs a notebook
    whole only where that is no longer the code that stands here.

    Dropped: execution times, papermill's and widgets' metadata, the widgets themselves (a viewer without a
    kernel cannot show them; the static table beside each stays) and the progress lines of other notebooks.
    """
    import nbformat
    from nbclient import NotebookClient

    for name in NOTEBOOKS:
        path, code = FOLDER / f"{name}.ipynb", source_sha256(name)
        notebook = nbformat.read(path, as_version=4)
        unchanged = notebook.metadata.get("outputs_of") == code
        if name[:2] not in numbers if numbers else unchanged:
            continue
        print(f"{name} …", flush=True)
        with tempfile.TemporaryDirectory() as folder, stderr_to(Path(folder) / "kernel.log"):
            NotebookClient(
                notebook, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}
            ).execute()
        notebook.metadata = {
            "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
            "outputs_of": code,
        }
        for cell in notebook.cells:
            cell.metadata = {k: v for k, v in cell.metadata.items() if k == "tags"}
            cell.source = cell.source.splitlines(keepends=True)  # a line a line, for whoever reads a diff
            if cell.cell_type == "code":
                cell.outputs = [o for o in map(_committed, cell.outputs) if o]
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _committed(output: Any) -> Any:
    """One output as it is committed, None to leave it out."""
    if output.get("name") == "stderr" or "application/vnd.jupyter.widget-view+json" in output.get("data", {}):
        return None
    output.pop("execution_count", None) if output["output_type"] != "execute_result" else None
    output["metadata"] = {} if "metadata" in output else None
    return {k: v for k, v in output.items() if v is not None and k != "transient"}


def reference_run(small: str = "tiny", large: str = "demo") -> None:
    """Record `rates` from the executions of two runs in the default lake."""
    runs = []
    lake = Lake("lake")
    for run in (small, large):
        pages = lake.need(run, "10_explore_index").counts.records_out
        stages = [
            (cls(**lake.need(run, n).params), pages, lake.execution(run, n).model_dump())
            for n, cls in STAGES.items()
        ]
        runs.append(stages)
    last = lake.need(large, "90_compare_generations")
    reference.write_reference("rates", last, machine_in_words(), {"stages": two_point_rates(*runs)})


def reference_methods(run: str = "sample", name: str = "methods") -> None:
    """Record `name` (60 shows `methods`, 61 `gpu_methods`) from 61's result of `run` in the default lake."""
    manifest = Lake("lake").need(run, "61_compare_peft_methods")
    rows = [
        {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()}
        for row in manifest.metrics["rows"]
    ]
    command = "make notebooks" if run == "sample" else f"kit run params/{run}.yaml --only 61"
    figures = {"command": command, "rows": rows, "claims": manifest.metrics["claims"]}
    reference.write_reference(name, manifest, machine_in_words(), figures)


def reference_classify(run: str, lake: str, command: str) -> None:
    """Record `classify`, which 63 shows, from the result of `run` in `lake`, made by `command`."""
    manifest = Lake(lake).need(run, "63_classify_sentiment")
    kept = {k: v for k, v in manifest.metrics.items() if k != "what_ran"}
    reference.write_reference("classify", manifest, machine_in_words(), {"command": command, **kept})


def machine_in_words() -> str:
    """This machine, in words."""
    return f"{process.cores()} cores of {process.processor()}, {compare_methods.gpu_name()}"


def main(words: list[str] | None = None) -> None:
    """What `python -m kit.maintain.refresh` does with these words."""
    parser = argparse.ArgumentParser(prog="python -m kit.maintain.refresh")
    verbs = parser.add_subparsers(dest="verb", required=True)
    notebooks = verbs.add_parser("notebooks", help="run notebooks and write their outputs")
    notebooks.add_argument("numbers", nargs="*", help="such as 10 21; none: those whose code has changed")
    rates = verbs.add_parser("reference", help="record the rates that estimates start from")
    rates.add_argument("small", nargs="?", default="tiny", help="a run in the default lake")
    rates.add_argument("large", nargs="?", default="demo", help="a larger one")
    methods = verbs.add_parser("methods", help="record a table of 61")
    methods.add_argument("run", nargs="?", default="sample", help="a run in the default lake")
    methods.add_argument("name", nargs="?", default="methods", choices=("methods", "gpu_methods"))
    classify = verbs.add_parser("classify", help="record a table of 63")
    for name in ("run", "lake", "command"):
        classify.add_argument(name)
    asked = vars(parser.parse_args(words))
    verb = asked.pop("verb")
    if verb == "notebooks":
        refresh_notebooks(*asked["numbers"])
    else:
        RECORDED[verb](**asked)


RECORDED = {"reference": reference_run, "methods": reference_methods, "classify": reference_classify}
"""What records figures, by its word on the command line."""


if __name__ == "__main__":
    main()
