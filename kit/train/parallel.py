"""One encoder classifier, trained by several processes in five ways; what `torchrun` starts on every rank.

    torchrun --nproc-per-node 2 -m kit.train.parallel FOLDER

`FOLDER` is a job that `kit.train.classify` wrote. The same code on gloo and CPUs or NCCL and GPUs, a rank on each. All
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import profile
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask

from kit.train.flops import measured_peak
from kit.train.load import set_threads
from kit.train.scaling import measured_links

JOB, ROWS, REPORT, START, CHECKPOINT = "job.json", "rows.safetensors", "report.json", "start", "checkpoint"
PAD_TO = 32
"""Rows are padded to a multiple of this: a pipeline has one plan for each length."""
WARM_UP = 2
"""Steps that are left out of the times: allocators, buckets and pipelines are set up in them."""
MEGATRON = {
    "attention.self.query": ColwiseParallel(), "attention.self.key": ColwiseParallel(),
    "attention.self.value": ColwiseParallel(), "attention.output.dense": RowwiseParallel(),
    "intermediate.dense": ColwiseParallel(), "output.dense": RowwiseParallel(),
}  # fmt: skip
"""How a BERT layer is cut: heads and inner width by columns, then back by rows (Shoeybi et al. 2019); the rest is whole."""


@dataclass(frozen=True)
class Job:
    """What every rank is told. A step trains on `rows` rows, in `accumulation` passes; `tensor` ranks share a layer."""

    strategy: str
    rows: int
    accumulation: int = 1
    tensor: int = 1
    steps: int = 1
    check_steps: int = 0
    learning_rate: float = 1e-4
    dtype: str = "float32"
    threads: int = 1
    seed: int = 0
    timeout_s: float = 300.0


Batch = dict[str, torch.Tensor]


def half(job: Job, device: torch.device) -> torch.autocast:
    """One forward pass in bfloat16 where the job says so.

    Around the pass alone: autocast keeps the weights it has cast, and those that FSDP2 gathered for an earlier pass
    would be taken again, their gradients lost.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=job.dtype == "bfloat16")


class Plain:
    """A model whose every rank runs all layers: alone, or with its weights or their gradients shared."""

    def __init__(self, model: PreTrainedModel, mesh: DeviceMesh, job: Job) -> None:
        self.data = mesh["data"] if "data" in (mesh.mesh_dim_names or ()) else None
        self.job = job
        self.model = self.wrap(model, mesh)

    def wrap(self, model: PreTrainedModel, mesh: DeviceMesh) -> nn.Module:
        """The model as this strategy has it."""
        return model

    def step(self, rows: Sequence[int], batch: Callable[[Sequence[int]], Batch]) -> torch.Tensor:
        """Gradients of the mean loss over `rows` (all ranks'); returns that loss."""
        rank, ranks = (self.data.get_local_rank(), self.data.size()) if self.data else (0, 1)
        passes, total = self.job.accumulation, torch.zeros(())
        for i in range(passes):
            with self.synchronised(i == passes - 1):
                made = batch(rows[i::passes][rank::ranks])
                labels = made.pop("labels")
                with half(self.job, labels.device):
                    logits = self.model(**made).logits
                loss = cross_entropy(logits.float(), labels) / passes
                loss.backward()
            total = total.to(loss) + loss.detach()
        if self.data:
            dist.all_reduce(total, group=self.data.get_group())
        return total / ranks

    def synchronised(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Ranks exchange gradients in the last pass of a step only."""
        return contextlib.nullcontext()


class Ddp(Plain):
    """Whole weights everywhere; gradients are averaged (PyTorch DDP)."""

    def wrap(self, model: PreTrainedModel, mesh: DeviceMesh) -> nn.Module:
        """See `Plain`."""
        return DistributedDataParallel(
            model, process_group=mesh["data"].get_group(), gradient_as_bucket_view=True
        )

    def synchronised(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """See `Plain`."""
        return contextlib.nullcontext() if last else self.model.no_sync()


class Fsdp(Plain):
    """Weights, gradients and optimizer state in slices, gathered layer by layer (FSDP2, ZeRO-3)."""

    def wrap(self, model: PreTrainedModel, mesh: DeviceMesh) -> nn.Module:
        """See `Plain`."""
        for layer in model.base_model.encoder.layer:
            fully_shard(layer, mesh=mesh["data"])
        return fully_shard(model, mesh=mesh["data"])

    def synchronised(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """See `Plain`."""
        self.model.set_requires_gradient_sync(last)
        return contextlib.nullcontext()


class Tensor(Plain):
    """Every matrix of a layer cut over the ranks, all of which work on the same rows (Megatron-style)."""

    def wrap(self, model: PreTrainedModel, mesh: DeviceMesh) -> nn.Module:
        """See `Plain`."""
        for layer in model.base_model.encoder.layer:
            parallelize_module(layer, mesh["tensor"], MEGATRON)
            attention = layer.attention.self
            attention.num_attention_heads //= mesh["tensor"].size()
            attention.all_head_size //= mesh["tensor"].size()
        return model


class TensorData(Fsdp):
    """Layers cut over some ranks, the slices' optimizer and gradients over the others: tensor × data."""

    def wrap(self, model: PreTrainedModel, mesh: DeviceMesh) -> nn.Module:
        """See `Plain`."""
        return super().wrap(Tensor.wrap(self, model, mesh), mesh)


class Pipeline(Plain):
    """Consecutive layers on each rank, passes one behind the other (torch.distributed.pipelining, 1F1B)."""

    def wrap(self, model: PreTrainedModel, mesh: DeviceMesh) -> nn.Module:
        """The layers of this rank under their own names."""
        self.rank, self.ranks, self.plans = mesh.get_local_rank(), mesh.size(), {}
        bert, each = model.base_model, model.config.num_hidden_layers // mesh.size()
        mine = range(self.rank * each, (self.rank + 1) * each)
        bert.encoder.layer = nn.ModuleDict({str(i): bert.encoder.layer[i] for i in mine})
        bert.embeddings = bert.embeddings if self.rank == 0 else None
        if self.rank < self.ranks - 1:
            bert.pooler = model.classifier = None
        return Part(model, self.job)

    def step(self, rows: Sequence[int], batch: Callable[[Sequence[int]], Batch]) -> torch.Tensor:
        """See `Plain`; each pass is cut further, so that as many are under way as there are ranks."""
        made = batch(rows)
        length, chunks = made["input_ids"].shape[1], self.job.accumulation * self.ranks
        if length not in self.plans:
            stage = PipelineStage(self.model, self.rank, self.ranks, made["input_ids"].device)
            loss = lambda logits, labels: cross_entropy(logits.float(), labels)  # noqa: E731
            self.plans[length] = Schedule1F1B(stage, chunks, loss_fn=loss)
        losses: list[torch.Tensor] = []
        first = (made["input_ids"],) if self.rank == 0 else ()
        last = {"target": made["labels"], "losses": losses} if self.rank == self.ranks - 1 else {}
        self.plans[length].step(*first, attention_mask=made["attention_mask"], return_outputs=False, **last)
        total = (
            torch.stack(losses).mean().detach() if losses else torch.zeros((), device=made["labels"].device)
        )
        dist.broadcast(total, src=self.ranks - 1)
        return total


class Part(nn.Module):
    """Some consecutive layers of a BERT classifier, with what comes before the first and after the last."""

    def __init__(self, model: PreTrainedModel, job: Job) -> None:
        super().__init__()
        self.model, self.job = model, job

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Token ids [rows, length] or hidden states → hidden states [rows, length, hidden] or logits [rows, classes]."""
        bert = self.model.base_model
        x = bert.embeddings(input_ids=x) if bert.embeddings is not None else x
        mask = create_bidirectional_mask(
            config=self.model.config, inputs_embeds=x, attention_mask=attention_mask
        )
        with half(self.job, x.device):
            for layer in bert.encoder.layer.values():
                x = layer(x, mask)
            return self.model.classifier(bert.pooler(x)) if self.model.classifier is not None else x


STRATEGIES: dict[str, type[Plain]] = {
    "one": Plain, "ddp": Ddp, "fsdp": Fsdp, "pipeline": Pipeline, "tensor": Tensor, "tensor_data": TensorData,
}  # fmt: skip
"""Every way, by the name that the parameters use."""


def mesh_of(job: Job, device: torch.device) -> DeviceMesh:
    """How the ranks are arranged: the fast neighbours share layers."""
    ranks = dist.get_world_size()
    tensor = {"tensor": ranks, "tensor_data": job.tensor}.get(job.strategy, 1)
    if job.strategy == "pipeline":
        return init_device_mesh(device.type, (ranks,), mesh_dim_names=("stage",))
    if job.strategy in ("one", "tensor"):
        return init_device_mesh(device.type, (ranks,), mesh_dim_names=("tensor",))
    return init_device_mesh(device.type, (ranks // tensor, tensor), mesh_dim_names=("data", "tensor"))


def steps_of(lengths: Sequence[int], rows: int, steps: int, seed: int) -> Iterator[list[int]]:
    """The rows of each step: shuffled every epoch, neighbours in length together, the longest of a step first.

    What does not fill a step at the end of an epoch comes in the next one, shuffled anew.
    """
    draw, made = torch.Generator().manual_seed(seed), 0
    while made < steps:
        order = torch.randperm(len(lengths), generator=draw).tolist()
        window = rows * 8
        groups = []
        for start in range(0, len(order), window):
            by_length = sorted(order[start : start + window], key=lambda i: -lengths[i])
            groups += [by_length[i : i + rows] for i in range(0, len(by_length), rows)]
        groups = [g for g in groups if len(g) == rows]
        if not groups:
            raise ValueError(f"{len(lengths)} rows do not fill a step of {rows}")
        for i in torch.randperm(len(groups), generator=draw).tolist()[: steps - made]:
            yield groups[i]
            made += 1


def padded(length: int) -> int:
    """The length that a batch is given whose longest row has `length` tokens."""
    return -(-length // PAD_TO) * PAD_TO


class Data:
    """The encoded rows of a job: `input_ids` one behind the other, their `lengths`, and `labels`."""

    def __init__(self, path: Path, device: torch.device) -> None:
        held = load_file(path)
        self.lengths, self.labels, self.device = held["lengths"].tolist(), held["labels"], device
        self.ids = held["input_ids"].split(self.lengths)

    def batch(self, rows: Sequence[int]) -> Batch:
        """Rows as [rows, length] tensors, padded to a multiple of `PAD_TO`."""
        length = padded(max(self.lengths[i] for i in rows))
        ids, mask = (torch.zeros(len(rows), length, dtype=torch.long) for _ in range(2))
        for row, i in enumerate(rows):
            ids[row, : self.lengths[i]], mask[row, : self.lengths[i]] = self.ids[i], 1
        made = {"input_ids": ids, "attention_mask": mask, "labels": self.labels[list(rows)]}
        return {name: value.to(self.device) for name, value in made.items()}


def save_rows(path: Path, rows: Sequence[Sequence[int]], labels: Sequence[int]) -> None:
    """Write encoded rows for `Data`."""
    save_file(
        {
            "input_ids": torch.tensor([t for row in rows for t in row]),
            "lengths": torch.tensor([len(row) for row in rows]),
            "labels": torch.tensor(labels),
        },
        path,
    )


def train(folder: Path, job: Job, mesh: DeviceMesh, device: torch.device) -> dict[str, Any]:
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


def _run(folder: Path, job: Job, mesh: DeviceMesh, data: Data) -> tuple[list[float], list[float], Plain]:
    """Losses and seconds of each step, and the model, from its start."""
    steps = job.steps
    model = AutoModelForSequenceClassification.from_pretrained(folder / START, dtype=torch.float32)
    strategy = STRATEGIES[job.strategy](model.to(data.device).train(), mesh, job)
    sliced = {True: [], False: []}  # a fused step takes weights of one kind at a time
    for w in strategy.model.parameters():
        sliced[isinstance(w, DTensor)].append(w)
    trained = [{"params": weights} for weights in sliced.values() if weights]
    optimizer = torch.optim.AdamW(trained, lr=job.learning_rate, weight_decay=0.01, fused=True)
    warm = max(1, steps // 10)
    rate = lambda step: min((step + 1) / warm, (steps - step) / max(1, steps - warm))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    losses, seconds = [], []
    for rows in steps_of(data.lengths, job.rows, steps, job.seed):
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
    busy, until = 0.0, 0.0
    for start, end in spans:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy / 1e6 / seconds


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state of this rank's model under the names of the whole one."""
    inner = model.model if isinstance(model, Part) else model
    return get_model_state_dict(inner)


def weights_here(model: nn.Module) -> list[torch.Tensor]:
    """What this rank holds of each weight."""
    return [w.to_local() if isinstance(w, DTensor) else w for w in model.parameters()]


def shards(model: nn.Module) -> dict[str, list[list[int]]]:
    """Local and whole shape of some weights on this rank: of the embeddings, its first layer, the classifier."""
    held = weights(model)
    first = next(name.split("layer.")[1].split(".")[0] for name in held if "encoder.layer." in name)
    shown = re.compile(rf"word_embeddings|layer\.{first}\.(attention\.self\.query|output\.dense)|classifier")
    found = {}
    for name, w in held.items():
        if shown.search(name) and name.endswith(".weight"):
            local = w.to_local() if isinstance(w, DTensor) else w
            found[name] = [list(local.shape), list(w.shape)]
    return found


def same_devices(names: Sequence[str]) -> None:
    """Raise `RuntimeError` for ranks on devices of different kinds: the slowest would set the pace, or nothing work."""
    if len(set(names)) > 1:
        raise RuntimeError(f"mixed devices: {', '.join(f'rank {i}: {name}' for i, name in enumerate(names))}")


def main(folder: Path) -> None:
    """One rank: train, and leave a report; what goes wrong here stands in a file that the parent reads."""
    job = Job(**json.loads((folder / JOB).read_text(encoding="utf-8")))
    gpu, rank = torch.cuda.is_available(), int(os.environ["RANK"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    set_threads(job.threads)
    try:
        if gpu:
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(seconds=job.timeout_s))
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
