"""What maintainers run after a change: the notebooks' committed outputs and the reference rates.

`make notebooks` and `make reference` call this module; nothing else in the kit does.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from kit import cost, process
from kit.lake import Lake, Manifest
from kit.measure import compare_methods
from kit.params import NOTEBOOKS, STAGES
from kit.pipeline import FOLDER
from kit.show import stderr_to


def refresh_notebooks(*numbers: str) -> None:
    """Run every notebook (or those of `numbers`) on its defaults and write it back with its outputs, cleaned.

    Dropped: execution times, papermill's and widgets' metadata, the widgets themselves (a viewer without a
    kernel cannot show them; the static table beside each stays) and the progress lines of other notebooks.
    """
    import nbformat
    from nbclient import NotebookClient

    for name in (n for n in NOTEBOOKS if not numbers or n[:2] in numbers):
        path = FOLDER / f"{name}.ipynb"
        notebook = nbformat.read(path, as_version=4)
        print(f"{name} …", flush=True)
        with tempfile.TemporaryDirectory() as folder, stderr_to(Path(folder) / "kernel.log"):
            NotebookClient(
                notebook, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}
            ).execute()
        notebook.metadata = {
            "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
        for cell in notebook.cells:
            cell.metadata = {k: v for k, v in cell.metadata.items() if k == "tags"}
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
    """Write `cost.REFERENCE` from the executions of two runs in the default lake, with machine, date and commit."""
    found = []
    lake = Lake("lake")
    for run in (small, large):
        pages = lake.need(run, "10_explore_index").counts.records_out
        stages = [
            (cls(**lake.need(run, n).params), pages, lake.execution(run, n).model_dump())
            for n, cls in STAGES.items()
        ]
        found.append(stages)
    made = _made_by(lake.need(large, "90_compare_generations")) | {"stages": cost.two_point_rates(*found)}
    cost.REFERENCE.parent.mkdir(exist_ok=True)
    cost.REFERENCE.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


def reference_methods(run: str = "sample", name: str = compare_methods.REFERENCE.stem) -> None:
    """Write the reference run `name` (60 shows `methods`, 61 `gpu_methods`) from 61's result of `run` in the default lake."""
    manifest = Lake("lake").need(run, "61_compare_peft_methods")
    rows = [
        {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()}
        for row in manifest.metrics["rows"]
    ]
    command = "make notebooks" if run == "sample" else f"kit run params/{run}.yaml --only 61"
    made = _made_by(manifest) | {"command": command, "rows": rows, "claims": manifest.metrics["claims"]}
    compare_methods.REFERENCE.with_stem(name).write_text(
        json.dumps(made, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def reference_classify(run: str, lake: str, command: str) -> None:
    """Write the reference run that 63 shows from the result of `run` in `lake`, made by `command`."""
    from kit.train import classify

    manifest = Lake(lake).need(run, "63_classify_sentiment")
    kept = {k: v for k, v in manifest.metrics.items() if k != "what_ran"}
    made = _made_by(manifest) | {"command": command, **kept}
    text = json.dumps(made, indent=1, ensure_ascii=False)
    classify.REFERENCE.write_text(text + "\n", encoding="utf-8")


def _made_by(manifest: Manifest) -> dict[str, str]:
    """Machine, date and commit of a result."""
    return {
        "machine": f"{process.cores()} cores of {process.processor()}, {compare_methods.gpu_name()}",
        "date": manifest.created_at[:10],
        "commit": str(manifest.code["git_sha"])[:10] + ("+" if manifest.code["dirty"] else ""),
    }


if __name__ == "__main__":
    verbs = {"notebooks": refresh_notebooks, "reference": reference_run, "methods": reference_methods}
    (verbs | {"classify": reference_classify})[sys.argv[1]](*sys.argv[2:])
