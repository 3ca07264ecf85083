"""What a run will take and what it took: seconds, memory and dollars.

An estimate is `fixed + per_unit × units`. The rate is this lake's own, from the manifest of an earlier run,
where there is one; else that of the reference run which ships with the kit (`kit.estimate.reference`: measured, with machine,
date and commit).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kit.estimate import reference
from kit.estimate.rates import deciding, planned_units, usd
from kit.lake.manifest import Manifest
from kit.params import Cores, Stage


@dataclass(frozen=True)
class Estimate:
    """Seconds, peak memory (MB) and dollars of one stage, and where the rate comes from."""

    stage: str
    work: str
    seconds: float
    memory_mb: float
    usd: float
    rate_from: str


def estimate_stage(
    p: Stage, pages: int, earlier: Manifest | None, planned: tuple[float, float, str] | None = None
) -> Estimate:
    """Time, memory and dollars of a stage; `earlier` is its last result in this lake, if there is one.

    Of an earlier run's seconds, the fixed part (starting an engine, loading a model) is taken from the
    reference and does not scale. `planned` (seconds past the fixed part, MB, from what) stands in where no run of
    this model has been measured. With `cores` given, Spark's stages are taken to scale with them from the reference's.
    """
    units, unit = planned_units(p, pages)
    work = f"{units:,.0f} {unit}"
    known = reference.read("rates")
    rate = known["stages"][p.stage]
    fixed = rate["fixed_s"]
    per_unit = rate["per_unit_s"]
    memory_mb = rate["memory_mb"]
    source = "reference run"

    # an earlier result says something only of a run with the same model, method and settings
    if earlier and any(earlier.params.get(k) != value for k, value in deciding(p).items()):
        earlier = None
    before = earlier and planned_units(type(p)(**earlier.params), earlier.counts.records_in)[0]

    # what was measured here goes before what a plan says, and that before the reference's two cores
    if earlier and before:
        fixed = min(fixed, earlier.seconds)
        per_unit, source = (earlier.seconds - fixed) / before, "this lake"
    elif planned:
        per_unit, memory_mb, source = planned[0] / units, round(planned[1]), planned[2]
    elif isinstance(p, Cores) and p.cores:
        made_on = known.get("cores", 2)
        per_unit, source = per_unit * made_on / p.cores, f"reference run, {made_on} → {p.cores} cores"
    seconds = fixed + per_unit * units
    return Estimate(p.stage, work, round(seconds, 1), memory_mb, usd(seconds, p.usd_per_hour), source)


def estimate_chain(stages: Sequence[Estimate], work: str) -> Estimate:
    """All `stages`, one after the other: their seconds and dollars added up, the memory of the largest."""
    return Estimate(
        stage="all",
        work=work,
        seconds=round(sum(stage.seconds for stage in stages), 1),
        memory_mb=max(stage.memory_mb for stage in stages),
        usd=sum(stage.usd for stage in stages),
        rate_from="",
    )
