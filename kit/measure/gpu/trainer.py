"""TRL's trainer over random rows of mixed lengths, with `kit.train.plan.settings`'s settings or TRL's own: rows of `gpu_suite`."""

from __future__ import annotations

import tempfile
from functools import partial
from typing import Any

import datasets
import torch
import trl
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from kit.measure.gpu.steps import GPU, LORA, loss_sum, make_model, memory, sync
from kit.train.encode.batches import collate_packed, predicted_tokens
from kit.train.models.adapters import low_rank
from kit.train.plan import settings

ROWS_A_STEP = 4
"""Packed rows; of padded ones TRL takes 8."""
PAD = 0


def epoch(
    sizes: dict[str, Any], chosen: dict[str, Any], length: int, documents: int, warm: int
) -> dict[str, Any]:
    """Tokens/s without padding of one epoch of LoRA, after `warm` steps, and the mean loss then of the first 16 rows.

    Lengths are drawn log-normally, a quarter of `length` at most, which is as long as TRL leaves rows. What does not
    fill a batch is left out, as other shapes would be compiled anew.
    """
    model, draw = make_model(sizes, chosen["weights"]), torch.Generator().manual_seed(0)
    lengths = (
        torch.empty(documents).log_normal_(5.6, 0.7, generator=draw).clamp(8, length // 4).int().tolist()
    )
    rows = [torch.randint(2, model.config.vocab_size, (n,), generator=draw).tolist() for n in lengths]
    with tempfile.TemporaryDirectory() as folder:
        trainer = suite_trainer(model, chosen, rows, length, folder)
        model.set_attn_implementation(chosen["attention"])
        with settings.prepared(trainer.model, chosen):
            trainer.train()
    times = [*trainer.times, (sync(), 0)]
    return {
        "settings": chosen,
        "tokens_per_s": sum(n for _, n in times[warm:]) / (times[-1][0] - times[warm][0]),
        "steps": len(times) - 1,
        "loss_after": mean_loss(model, rows[:16]),
        "peak_bytes": memory()[1],
    }


class Timed(trl.SFTTrainer):
    """Notes when each step begins, and its tokens without padding."""

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any) -> torch.Tensor:
        """One forward and backward pass."""
        self.times = [*getattr(self, "times", []), (sync(), int((inputs["input_ids"] != PAD).sum()))]
        return super().training_step(model, inputs, *args)


def suite_trainer(
    model: torch.nn.Module, chosen: dict[str, Any], rows: list[list[int]], length: int, folder: str
) -> Timed:
    """The trainer; whatever is not in `made` is as TRL has it, but for files, logs, and the last batch."""
    datasets.disable_progress_bars()
    data = datasets.Dataset.from_dict({"input_ids": rows, "labels": rows})
    asked = settings.arguments(chosen | ({} if GPU else {"autocast": False}))
    known = trl.SFTConfig.__dataclass_fields__
    if "activation_checkpointing" not in known:  # transformers before it took this name
        asked["gradient_checkpointing"] = asked.pop("activation_checkpointing")
    if chosen["packing"]:
        data = trl.pack_dataset(data, length, strategy="bfd")
        asked |= {
            "per_device_train_batch_size": ROWS_A_STEP,
            "dataset_kwargs": {"skip_prepare_dataset": True},
        }
    # all of one length: others would be compiled anew
    packed = partial(collate_packed, pad=PAD, length=length)
    words = Tokenizer(models.WordLevel({"<pad>": PAD, "<eos>": 1}, unk_token="<pad>"))
    quiet = {
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_drop_last": True,
        "num_train_epochs": 1,
    }
    return Timed(
        model,
        trl.SFTConfig(folder, use_cpu=not GPU, **quiet, **asked),
        data_collator=packed if chosen["packing"] else None,
        train_dataset=data,
        processing_class=PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="<pad>", eos_token="<eos>"
        ),
        peft_config=low_rank(**LORA),
    )


@torch.no_grad()
def mean_loss(model: torch.nn.Module, rows: list[list[int]]) -> float:
    """Mean −log p of the tokens of some rows, each by itself."""
    total, device = 0.0, model.device
    with torch.autocast(device.type, torch.bfloat16, enabled=GPU):
        for ids in (torch.tensor([row], device=device) for row in rows):
            hidden = model.model(ids, use_cache=False).last_hidden_state
            states, tokens = predicted_tokens(hidden, ids)
            total += loss_sum(states, model.get_output_embeddings().weight, tokens).item()
    return total / sum(len(row) - 1 for row in rows)
