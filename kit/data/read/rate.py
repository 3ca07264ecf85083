"""Tasks on Spark that fetch: one polite rate for the whole job, on one core or on a cluster.

A rate that each process keeps for itself grows with the cluster, so a job's rate is divided by the number of tasks
that run at the same time, and Spark is given no more partitions than that: executors that join later find nothing
left to start, and the rate holds whatever happens. Over S3 and on a disk nothing is divided: there is no rate to keep.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from kit.data.engine.spark import Task, run_tasks, slots
from kit.data.read import polite
from kit.params.data import Fetching

HTTP = ("http://", "https://")


def run_at_rate(
    p: Fetching,
    work: Callable[[Task], dict[str, Any]],
    tasks: Sequence[Task],
    label: str,
    unit: str,
    uris: Iterable[str],
) -> list[dict[str, Any]]:
    """`spark.run_tasks` for tasks that read below `uris`: all together ask at most `p.requests_per_s` times a second.

    Retries and the contact that is named to servers are `p`'s, too. Not counted: tasks that Spark runs twice at the
    same time because it was told to (`spark.speculation`).
    """
    over_http = any(uri.startswith(HTTP) for uri in uris)
    if over_http and not p.contact:
        print(
            "(servers are told no contact: set contact=you@example.org, so that they can write before they block)"
        )
    lanes = min(slots(p), max(len(tasks), 1)) if over_http else 0
    rate, retries, contact = p.requests_per_s, p.retries, p.contact

    def begin(lane: int) -> None:
        polite.configure(requests_per_s=rate / max(lanes, 1), retries=retries, contact=contact)
        # one after the other: a hundred lanes that asked at the same moment would keep a mean, and be a burst
        polite.gate.hold(lane / rate if lanes else 0)

    # this process looks at single pages, before or after
    polite.configure(requests_per_s=rate, retries=retries, contact=contact)
    return run_tasks(p, work, tasks, label, unit, lanes, begin)
