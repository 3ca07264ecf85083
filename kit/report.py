"""A run's page: what its models say, what each stage did and took, and what became of the records."""

from __future__ import annotations

import io
from typing import Any

from kit.lake.files import store_errors
from kit.lake.manifest import Manifest, counts_line
from kit.lake.store import Lake
from kit.pipeline import State
from kit.show import Table, escape, html_page, lines


def stage_table(lake: Lake, run: str, states: list[State]) -> Table:
    """One row a stage: status, records, seconds and memory with the kernel's own, dollars."""
    rows = []
    for state in states:
        manifest = state.manifest
        execution = lake.execution(run, state.stage)
        row: dict[str, Any] = {"stage": state.stage, "status": state.status}
        counted = dict.fromkeys(("in", "created", "out", "dropped", "failed", "seconds", "MB", "usd"))
        if manifest:
            counts = manifest.counts
            counted = {
                "in": counts.records_in,
                "created": counts.created,
                "out": counts.records_out,
                "dropped": sum(counts.dropped.values()),
                "failed": sum(counts.failed.values()),
                # a notebook that somebody ran by hand has only its own seconds, without the kernel's start
                "seconds": round(manifest.seconds, 1) if execution.seconds is None else execution.seconds,
                "MB": execution.peak_memory_mb,
                "usd": f"{manifest.cost_usd:.4f}",
            }
        rows.append(row | counted | {"why": state.why})
    return Table(rows, width=60)


def write_report(lake: Lake, run: str, states: list[State]) -> str:
    """Write the run's page `reports/<run>/index.html`: completions, perplexity, stages, loss curves; returns its path."""
    manifests = [state.manifest for state in states if state.manifest]
    parts = [_section(title, table._repr_html_()) for title, table in results(lake, run)]
    parts.append(_section("Stages", stage_table(lake, run, states)._repr_html_()))
    parts.append(_section("Where records went", _losses(manifests)))
    for manifest in manifests:
        if curve := manifest.metrics.get("losses"):
            parts.append(inline(lines({"loss": curve}, f"{manifest.stage}: loss", "step", "loss")))
    if manifests:
        parts.append(_versions(manifests[-1]))
    path = f"{lake.root}/reports/{run}/index.html"
    with store_errors(f"cannot write {path}"):
        lake.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        lake.fs.pipe_file(path, html_page(f"Run {run}", *parts).encode("utf-8", "replace"))
    return path if lake.uri == lake.root else lake.fs.unstrip_protocol(path)


def _section(title: str, markup: str) -> str:
    return f"<h2>{escape(title)}</h2>{markup}"


def _losses(manifests: list[Manifest]) -> str:
    """One line a stage, that says where its records went."""
    items = (f"<li><b>{escape(m.stage)}</b>: {escape(counts_line(m.counts))}</li>" for m in manifests)
    return f"<ul>{''.join(items)}</ul>"


def _versions(manifest: Manifest) -> str:
    """What a result was made by."""
    libraries = " · ".join(f"{name} {version}" for name, version in manifest.environment.items())
    commit = str(manifest.code["git_sha"])[:10]
    return f'<p class="note">{escape(libraries)} · commit {escape(commit)}</p>'


def results(lake: Lake, run: str) -> list[tuple[str, Table]]:
    """The tables of the last stage: completions side by side and held-out perplexity."""
    manifest = lake.manifest(run, "90_compare_generations")
    if manifest is None:
        return []
    titles = {"completions.parquet": "base | tuned | aligned", "perplexity.parquet": "Held-out perplexity"}
    have = {o.name for o in manifest.outputs}
    return [
        (title, Table(lake.table(manifest, name).to_pylist(), width=400))
        for name, title in titles.items()
        if name in have
    ]


def inline(ax: Any) -> str:
    """A figure as SVG markup for a page; closes it."""
    import matplotlib.pyplot as plt

    buffer = io.StringIO()
    ax.figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(ax.figure)
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]
