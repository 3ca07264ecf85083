"""Five ways to share the training of one encoder classifier among processes, and one process to hold them against."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask

from kit.train.parallel.rank_job import Batch, RankJob

MEGATRON = {
    "attention.self.query": ColwiseParallel(),
    "attention.self.key": ColwiseParallel(),
    "attention.self.value": ColwiseParallel(),
    "attention.output.dense": RowwiseParallel(),
    "intermediate.dense": ColwiseParallel(),
    "output.dense": RowwiseParallel(),
}
"""How a BERT layer is cut: heads and inner width by columns, then back by rows (Shoeybi et al. 2019); the rest is whole."""


def half(job: RankJob, device: torch.device) -> torch.autocast:
    """One forward pass in bfloat16 where the job says so.

    Around the pass alone: autocast keeps the weights it has cast, and those that FSDP2 gathered for an earlier pass
    would be taken again, their gradients lost.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=job.dtype == "bfloat16")


class Plain:
    """A model whose every rank runs all layers: alone, or with its weights or their gradients shared."""

    def __init__(self, model: PreTrainedModel, mesh: DeviceMesh, job: RankJob) -> None:
        self.data = mesh["data"] if "data" in (mesh.mesh_dim_names or ()) else None
        self.job = job
        self.model = self.wrap(model, mesh)

    def wrap(self, model: PreTrainedModel, mesh: DeviceMesh) -> nn.Module:
        """The model as this strategy has it."""
        return model

    def step(self, rows: Sequence[int], batch: Callable[[Sequence[int]], Batch]) -> torch.Tensor:
        """Gradients of the mean loss over `rows` (all ranks'); returns that loss."""
        rank, ranks = (self.data.get_local_rank(), self.data.size()) if self.data else (0, 1)
        passes = self.job.accumulation
        total = torch.zeros(())
        for i in range(passes):
            with self.synchronised(i == passes - 1):
                # every passes-th row, and of those every ranks-th: longest first, so all ranks get alike ones
                inputs = batch(rows[i::passes][rank::ranks])
                labels = inputs.pop("labels")
                with half(self.job, labels.device):
                    logits = self.model(**inputs).logits
                # in float32: bfloat16 would round the differences that are to be compared away
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
        # layer by layer, the whole last: what is not in a layer (embeddings, head) is then a group of its own
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
            # the module splits its output into heads by these numbers, and has fewer heads now
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
        # a dictionary and not a list: a layer keeps its number, so that the checkpoint has the whole model's names
        bert.encoder.layer = nn.ModuleDict({str(i): bert.encoder.layer[i] for i in mine})
        bert.embeddings = bert.embeddings if self.rank == 0 else None
        if self.rank < self.ranks - 1:
            bert.pooler = model.classifier = None
        return Part(model, self.job)

    def step(self, rows: Sequence[int], batch: Callable[[Sequence[int]], Batch]) -> torch.Tensor:
        """See `Plain`; each pass is cut further, so that as many are under way as there are ranks."""
        inputs = batch(rows)
        length = inputs["input_ids"].shape[1]
        chunks = self.job.accumulation * self.ranks
        if length not in self.plans:
            stage = PipelineStage(self.model, self.rank, self.ranks, inputs["input_ids"].device)
            loss = lambda logits, labels: cross_entropy(logits.float(), labels)  # noqa: E731
            self.plans[length] = Schedule1F1B(stage, chunks, loss_fn=loss)
        losses: list[torch.Tensor] = []
        first = (inputs["input_ids"],) if self.rank == 0 else ()
        last = {"target": inputs["labels"], "losses": losses} if self.rank == self.ranks - 1 else {}
        self.plans[length].step(*first, attention_mask=inputs["attention_mask"], return_outputs=False, **last)
        total = (
            torch.stack(losses).mean().detach() if losses else torch.zeros((), device=inputs["labels"].device)
        )
        # only the last stage has seen a loss
        dist.broadcast(total, src=self.ranks - 1)
        return total


class Part(nn.Module):
    """Some consecutive layers of a BERT classifier, with what comes before the first and after the last."""

    def __init__(self, model: PreTrainedModel, job: RankJob) -> None:
        super().__init__()
        self.model, self.job = model, job

    def forward(self, hidden: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Token ids [rows, length] or hidden states → hidden states [rows, length, hidden] or logits [rows, classes]."""
        bert = self.model.base_model
        hidden = bert.embeddings(input_ids=hidden) if bert.embeddings is not None else hidden
        mask = create_bidirectional_mask(
            config=self.model.config, inputs_embeds=hidden, attention_mask=attention_mask
        )
        with half(self.job, hidden.device):
            for layer in bert.encoder.layer.values():
                hidden = layer(hidden, mask)
            return self.model.classifier(bert.pooler(hidden)) if self.model.classifier is not None else hidden


STRATEGIES: dict[str, type[Plain]] = {
    "one": Plain,
    "ddp": Ddp,
    "fsdp": Fsdp,
    "pipeline": Pipeline,
    "tensor": Tensor,
    "tensor_data": TensorData,
}
"""Every way, by the name that the parameters use."""


def mesh_of(job: RankJob, device: torch.device) -> DeviceMesh:
    """How the ranks are arranged: the fast neighbours share layers."""
    ranks = dist.get_world_size()
    tensor = {"tensor": ranks, "tensor_data": job.tensor}.get(job.strategy, 1)
    if job.strategy == "pipeline":
        return init_device_mesh(device.type, (ranks,), mesh_dim_names=("stage",))
    if job.strategy in ("one", "tensor"):
        return init_device_mesh(device.type, (ranks,), mesh_dim_names=("tensor",))
    return init_device_mesh(device.type, (ranks // tensor, tensor), mesh_dim_names=("data", "tensor"))


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state of this rank's model under the names of the whole one."""
    inner = model.model if isinstance(model, Part) else model
    return get_model_state_dict(inner)
