"""Ranks on this machine: what each is told, whether they can share the work, starting them, and who failed first."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from kit import ROOT, process
from kit.errors import ModelError
from kit.params import ClassifySentiment
from kit.progress import Progress
from kit.train.models import load
from kit.train.parallel import rank as parallel
from kit.train.parallel.rank_job import CHECKPOINT, JOB, REPORT, RankJob


def jobs(p: ClassifySentiment, name: str) -> tuple[RankJob, int]:
    """The job of one way, and on how many ranks."""
    (fit,) = p.fits()
    job = RankJob(
        strategy=name,
        rows=fit.step_rows,
        accumulation=fit.accumulation,
        tensor=p.tensor_ranks,
        steps=fit.steps,
        check_steps=p.check_steps,
        learning_rate=fit.learning_rate,
        dtype=str(load.pick_dtype(p.dtype)).removeprefix("torch."),
        threads=p.rank_threads,
        seed=p.seed,
        timeout_s=p.rank_timeout_s,
    )
    return job, {"one": 1, "tensor_data": p.tensor_ranks * p.data_ranks}.get(name, p.ranks)


def require(name: str, job: RankJob, ranks: int, config: PretrainedConfig) -> None:
    """Raise `ModelError` when ranks cannot share what they are to share: heads, layers, rows of a pass."""
    tensor = {"tensor": ranks, "tensor_data": job.tensor}.get(name, 1)
    stages = ranks if name == "pipeline" else 1
    data = 1 if name in ("one", "pipeline") else ranks // tensor
    passes = job.accumulation * stages
    wanted = (
        ("attention heads", config.num_attention_heads, tensor),
        ("inner width", config.intermediate_size, tensor),
        ("layers", config.num_hidden_layers, stages),
        ("rows of a pass", job.rows // passes, data),
        ("rows of a step", job.rows, passes),
    )
    for what, many, parts in wanted:
        if many % parts:
            fits = [n for n in range(1, parts) if many % n == 0][-1]
            raise ModelError(f"{name}: {many} {what} cannot be shared by {parts}; {fits} would do")
    if name not in ("one", "ddp") and config.model_type != "bert":
        raise ModelError(f"{name} knows how to cut a BERT, not a {config.model_type}: take ddp")
    if torch.cuda.is_available() and ranks > torch.cuda.device_count():
        raise ModelError(
            f"{name} wants {ranks} GPUs and {torch.cuda.device_count()} are here: lower the ranks"
        )


def launch(folder: Path, job: RankJob, ranks: int, bar: Progress) -> list[dict[str, Any]]:
    """Run `job` by `torchrun` on `ranks` processes here; what each of them reports. Raises `ModelError`."""
    # what an earlier way left must not pass for this one's
    for old in (REPORT, *(f.name for f in folder.glob("rank-*.error"))):
        (folder / old).unlink(missing_ok=True)
    # of another way: more ranks than now may have left shards that would be read as this one's
    shutil.rmtree(folder / CHECKPOINT, ignore_errors=True)
    (folder / JOB).write_text(json.dumps(asdict(job)), encoding="utf-8")
    # port 0: any that is free, so that two runs on one machine do not meet
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    command = [*torchrun, *meeting, "--nproc-per-node", str(ranks), "-m", parallel.__name__, str(folder)]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "OMP_NUM_THREADS": str(job.threads), "PYTHONPATH": paths}
    log = folder / "torchrun.log"
    with (
        log.open("wb") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=env, text=True) as run,
    ):
        try:
            for line in run.stdout:
                if line.startswith("{"):
                    said = json.loads(line)
                    bar.update()
                    bar.note(
                        f"{job.strategy} on {ranks}: step {said['step']} of {said['of']}, loss {said['loss']:.3f}"
                    )
        except BaseException:
            # torchrun gives every rank a session of its own
            process.kill_family(run.pid)
            raise
    if run.returncode and (folder / REPORT).exists():
        bar.note(
            f"{job.strategy}: done, but a rank ended badly afterwards ({cause(folder, log.read_text())})"
        )
    if not (folder / REPORT).exists():  # written when every rank has trained and saved
        raise ModelError(
            f"{job.strategy} on {ranks} ranks stopped: {cause(folder, log.read_text(errors='replace'))}"
        )
    return json.loads((folder / REPORT).read_text(encoding="utf-8"))


def cause(folder: Path, log: str) -> str:
    """Which rank failed first, and with what: the others' errors only say that it is gone."""
    killed = re.findall(r"rank\s*: (\d+) .*?\n\s*exitcode\s*: -(\d+)", log)
    # torchrun itself ends the others with SIGTERM once one has died
    killed = [(rank, number) for rank, number in killed if int(number) != signal.SIGTERM]
    if killed:
        sent = int(killed[0][1]) == signal.SIGKILL
        why = "was killed, most likely for want of memory" if sent else "crashed"
        return f"rank {killed[0][0]} {why} (signal {killed[0][1]})"
    errors = sorted(folder.glob("rank-*.error"), key=lambda f: f.stat().st_mtime_ns)
    if errors:
        return f"{errors[0].stem.replace('-', ' ')}: {errors[0].read_text(encoding='utf-8').strip().splitlines()[-1]}"
    return (log.strip().splitlines() or ["torchrun said nothing"])[-1]
