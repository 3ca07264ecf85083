"""One encoder classifier, trained by several processes in five ways; what `torchrun` starts on every rank.

    torchrun --nproc-per-node 2 -m kit.train.parallel.rank FOLDER

`FOLDER` is a job that `kit.train.parallel.classify` wrote. The same code on gloo and CPUs or NCCL and GPUs, a rank on each. All
ways see the same rows in the same steps and so have the same loss; dropout is off, whose draws would differ by rank.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.profiler import profile
from transformers import AutoModelForSequenceClassification

from kit.train.models.load import set_threads
from kit.train.parallel.rank_job import CHECKPOINT, JOB, REPORT, ROWS, START, Data, RankJob, steps_of
from kit.train.parallel.strategies import STRATEGIES, Plain, mesh_of, weights
from kit.train.plan.peak import measured_peak
from kit.train.plan.scaling import measured_links

WARM_UP = 2
"""Steps that are left out of the times: allocators, buckets and pipelines are set up in them."""


def train(folder: Path, job: RankJob, mesh: DeviceMesh, device: torch.device) -> dict[str, Any]:
    """Train as `job` says and leave a sharded checkpoint; what was measured on this rank."""
    data = Data(folder / ROWS, device)
    checked, _, _ = _run(folder, replace(job, dtype="float32", steps=job.check_steps), mesh, data)
    losses, seconds, strategy = _run(folder, job, mesh, data)
    dcp.save({"model": weights(strategy.model)}, checkpoint_id=folder / CHECKPOINT)
    return {
        "checked": checked,
        "losses": losses,
        "seconds": seconds,
        "communication": strategy.communication,
        "parameters_here": sum(w.numel() for w in weights_here(strategy.model)),
        "shards": shards(strategy.model),
    }


def timed(steps: int) -> range:
    """The steps that count: not the first ones, and not the last, which is profiled."""
    return range(WARM_UP, steps - 1) or range(steps)


def _run(folder: Path, job: RankJob, mesh: DeviceMesh, data: Data) -> tuple[list[float], list[float], Plain]:
    """Losses and seconds of each step, and the model, from its start."""
    steps = job.steps
    model = AutoModelForSequenceClassification.from_pretrained(folder / START, dtype=torch.float32)
    strategy = STRATEGIES[job.strategy](model.to(data.device).train(), mesh, job)
    # a fused step takes weights of one kind at a time, and a strategy may slice only some of them
    sliced = {True: [], False: []}
    for w in strategy.model.parameters():
        sliced[isinstance(w, DTensor)].append(w)
    trained = [{"params": weights} for weights in sliced.values() if weights]
    optimizer = torch.optim.AdamW(trained, lr=job.learning_rate, weight_decay=0.01, fused=True)
    # up over a tenth of the steps, from the first on above zero, then straight down to zero
    warm = max(1, steps // 10)
    rate = lambda step: min((step + 1) / warm, (steps - step) / max(1, steps - warm))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    losses, seconds = [], []
    for rows in steps_of(data.lengths, job.rows, steps, job.seed):
        # the last step is looked into for messages, which slows it: `timed` leaves it out
        looked = profile() if len(losses) == steps - 1 and steps > WARM_UP else contextlib.nullcontext()
        began = time.perf_counter()
        with looked:
            loss = strategy.step(rows, data.batch)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())  # waits for the device
        schedule.step()
        seconds.append(time.perf_counter() - began)
        if dist.get_rank() == 0:
            print(json.dumps({"step": len(losses), "loss": losses[-1], "of": steps}), flush=True)
    strategy.communication = communication(looked, seconds[-1]) if steps > WARM_UP else 0.0
    return losses, seconds, strategy


def communication(seen: profile, seconds: float) -> float:
    """Share of a step in which this rank had a message under way: waiting for slower ranks and hidden messages count."""
    spans = sorted(
        (e.time_range.start, e.time_range.end) for e in seen.events() if re.match("gloo:|nccl", e.name)
    )
    # messages overlap: seconds in which at least one was under way
    busy, until = 0.0, 0.0
    for start, end in spans:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy / 1e6 / seconds  # the profiler counts microseconds


def weights_here(model: nn.Module) -> list[torch.Tensor]:
    """What this rank holds of each weight."""
    return [w.to_local() if isinstance(w, DTensor) else w for w in model.parameters()]


def shards(model: nn.Module) -> dict[str, list[list[int]]]:
    """Local and whole shape of some weights on this rank: of the embeddings, its first layer, the classifier."""
    held = weights(model)
    first = next(name.split("layer.")[1].split(".")[0] for name in held if "encoder.layer." in name)
    shown = re.compile(rf"word_embeddings|layer\.{first}\.(attention\.self\.query|output\.dense)|classifier")
    shapes = {}
    for name, w in held.items():
        if shown.search(name) and name.endswith(".weight"):
            local = w.to_local() if isinstance(w, DTensor) else w
            shapes[name] = [list(local.shape), list(w.shape)]
    return shapes


def same_devices(names: Sequence[str]) -> None:
    """Raise `RuntimeError` for ranks on devices of different kinds: the slowest would set the pace, or nothing work."""
    if len(set(names)) > 1:
        raise RuntimeError(f"mixed devices: {', '.join(f'rank {i}: {name}' for i, name in enumerate(names))}")


def main(folder: Path) -> None:
    """One rank: train, and leave a report; what goes wrong here stands in a file that the parent reads."""
    job = RankJob(**json.loads((folder / JOB).read_text(encoding="utf-8")))
    gpu, rank = torch.cuda.is_available(), int(os.environ["RANK"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    set_threads(job.threads)  # before anything is computed or measured
    try:
        if gpu:
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(seconds=job.timeout_s))
        # before anything is measured: on mixed devices every figure would be wrong
        names: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(names, torch.cuda.get_device_name() if gpu else "cpu")
        same_devices(names)
        mesh = mesh_of(job, device)
        # all ranks at once: cores and memory are shared
        peak = measured_peak(8192 if gpu else 768, getattr(torch, job.dtype), seconds=0.5)
        links = asdict(measured_links(1.0)) if dist.get_world_size() > 1 else None
        mine = train(folder, job, mesh, device) | {"links": links}
        mine |= {
            "rank": rank,
            "device": str(device),
            "name": names[rank],
            "peak_flops_per_s": peak,
            "threads": job.threads,
        }
        axes = mesh.mesh_dim_names
        mine |= {"mesh": dict(zip(axes, mesh.shape)), "coordinate": dict(zip(axes, mesh.get_coordinate()))}
        mine |= {"strategy": job.strategy}
        reports: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(reports, mine)
        if rank == 0:
            (folder / REPORT).write_text(json.dumps(reports), encoding="utf-8")
        dist.barrier()  # nobody hangs up while another still talks: gloo would abort it
        dist.destroy_process_group()
    except BaseException:
        (folder / f"rank-{rank}.error").write_text(traceback.format_exc(), encoding="utf-8")
        raise


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    # all is written; on the way out torch 2.13 at times destroys a thread that still runs, and aborts ("terminate called
    # without an active exception", after the profiler has run with gloo)
    sys.stdout.flush()
    os._exit(0)
