"""What a training stage knows of its parameters, its model and its machine: worked out once, at its door.

| what | where it comes from |
|---|---|
| rows, texts, tokens, steps, accumulation | the stage's own `fits` |
| method, adapter, quantisation, learning rate | the parameters, and `kit.train.models.methods` for what they leave open |
| type | the parameters; auto: what the machine multiplies fast |
| kernels, optimizer, autocast, compiling | `kit.train.plan.settings`, of all these |
| memory and speed | the machine, this one unless a plan is made for another |
| context | the model's own configuration |
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kit.errors import ModelError
from kit.params import FinetuneSft, Training, Tuning
from kit.params.fit import Fit
from kit.train.models import load
from kit.train.models.methods import METHODS, adapter_config, base_quantization
from kit.train.plan import dry, settings
from kit.train.plan import machine as machines
from kit.train.plan.machine import Machine


@dataclass(frozen=True)
class Setup:
    """One training as it will be: of the model `base_model` by `method`, as much as `fit` says, on `machine`.

    `dtype`: what the matmuls compute in, and the type of frozen weights. `quantization`: of the frozen base.
    `learning_rate`: the peak. `unpacked`: why rows are not packed although the parameters ask for it. `changes`: take
    the place of what `kit.train.plan.settings` would choose, by its names. `given`: the parameters as a person set them, only
    to say which of them would have to change.
    """

    fit: Fit
    machine: Machine
    given: Training
    base_model: str
    trust_remote_code: bool
    seed: int
    dtype: torch.dtype
    method: str
    adapter: PeftConfig | None
    lora_r: int
    virtual_tokens: int
    quantization: str
    learning_rate: float
    optimizer: str
    attention: str
    compile_model: str
    activation_checkpointing: bool
    packing: bool = False
    unpacked: str = ""
    changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def full(self) -> bool:
        """Whether all weights are trained."""
        return self.adapter is None

    @property
    def mixed(self) -> bool:
        """Whether weights in float32 compute in bfloat16."""
        return self.full and self.dtype == torch.bfloat16

    @property
    def weights(self) -> torch.dtype:
        """The type that plain weights are kept in; trained ones in float32: small updates would vanish in bfloat16."""
        return torch.float32 if self.full else self.dtype

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """The choices of `kit.train.plan.settings`; raises `ModelError` for a kernel that is not installed."""
        try:
            chosen = settings.recipe(
                full=self.full,
                bf16=self.dtype == torch.bfloat16,
                gpu=self.machine.gpu,
                attention=self.attention,
                optimizer=self.optimizer,
                compile_model=self.compile_model,
                packing=self.packing,
                activation_checkpointing=self.activation_checkpointing,
                steps=self.fit.steps,
            )
        except ValueError as error:
            raise ModelError(str(error)) from None
        return {**chosen, **self.changes}

    @cached_property
    def seen(self) -> dry.Seen:
        """The model's sizes, counted without its weights."""
        return dry.look(
            self.base_model,
            self.trust_remote_code,
            self.method,
            self.lora_r,
            self.virtual_tokens,
            self.weights,
            self.mixed,
        )

    def with_rows(self, rows: int) -> Setup:
        """The same training with `rows` rows a pass."""
        # the parameters change along, so that a manifest says what ran
        fit = replace(self.fit, rows=rows, fill_memory=False)
        return replace(self, fit=fit, given=self.given.model_copy(update={fit.batch_field: rows}))

    def new_adapter(self) -> PeftConfig | None:
        """PEFT's configuration, of which every model wants its own: PEFT writes into it."""
        return copy.deepcopy(self.adapter)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the base."""
        return load.load_tokenizer(self.base_model, trust_remote_code=self.trust_remote_code)

    def model(self, adapters: Sequence[str | Path] = ()) -> PreTrainedModel:
        """The model to train or to train over, with `adapters` merged into it (see `load.load_model`)."""
        return load.load_model(
            self.base_model,
            dtype=self.recipe["weights"],
            adapters=adapters,
            quantization=self.quantization,
            trust_remote_code=self.trust_remote_code,
        )

    def require_context(self) -> None:
        """Raise `ModelError` for texts longer than the model was made for: positions past its end are noise."""
        text = dry.read_config(self.base_model, self.trust_remote_code).get_text_config()
        most = getattr(text, "max_position_embeddings", None)
        if most and self.fit.tokens > most:
            asked = f"{self.fit.tokens_field}={self.fit.tokens}"
            raise ModelError(f"{asked} is longer than the model's context of {most} tokens")


def resolve_setup(
    p: Training, fit: Fit | None = None, machine: Machine | None = None, changes: Mapping[str, Any] = {}
) -> Setup:
    """The training that `p` asks for: of `fit`, which is needed where a stage has two, on `machine` (None: this one).

    A stage that offers no choice of method trains all weights, with the rest as `Tuning` has it by default. Raises
    `ModelError` for all weights over a quantised base.
    """
    # a stage with two trainings has to say which one is meant
    if fit is None:
        (fit,) = p.fits()
    chosen = p if isinstance(p, Tuning) else Tuning(method="full")
    adapter, quantization = adapter_config(chosen), base_quantization(chosen)
    # PEFT puts a learned prompt before a row once, and a packed row holds several documents
    prompt = adapter is not None and adapter.is_prompt_learning
    asked = isinstance(p, FinetuneSft) and p.packing
    return Setup(
        fit=fit,
        machine=machine or machines.this_machine(load.pick_dtype(p.dtype)),
        given=p,
        base_model=p.base_model,
        trust_remote_code=p.trust_remote_code,
        seed=p.seed,
        dtype=dtype_on(machine, p.dtype),
        method=chosen.method,
        adapter=adapter,
        lora_r=chosen.lora_r,
        virtual_tokens=chosen.virtual_tokens,
        quantization=quantization,
        learning_rate=fit.learning_rate or METHODS[chosen.method].learning_rate,
        optimizer=chosen.optimizer,
        attention=chosen.attention,
        compile_model=chosen.compile_model,
        activation_checkpointing=chosen.activation_checkpointing,
        packing=asked and not prompt,
        unpacked="a learned prompt would stand before one row only" if asked and prompt else "",
        changes=changes,
    )


def dtype_on(machine: Machine | None, asked: str) -> torch.dtype:
    """The type that `asked` means on `machine`: auto is bfloat16 on every GPU that is planned for; None: this one."""
    elsewhere = machine is not None and machine.gpu and asked == "auto"
    return torch.bfloat16 if elsewhere else load.pick_dtype(asked)


def trainer_arguments(setup: Setup, model: torch.nn.Module, folder: Path) -> dict[str, Any]:
    """What every TRL trainer of the kit is told; the model is given the recipe to keep, and its attention kernel."""
    model.recipe = recipe = setup.recipe
    set_attention(model, recipe["attention"])
    fit = setup.fit
    return {
        "output_dir": str(folder),
        "seed": setup.seed,
        "max_length": fit.tokens,
        "max_steps": fit.steps,
        "per_device_train_batch_size": fit.rows,
        "gradient_accumulation_steps": fit.accumulation,
        "learning_rate": setup.learning_rate,
        "lr_scheduler_type": "cosine",
        "use_cpu": model.device.type == "cpu",
        **settings.arguments(recipe),
        "save_strategy": "steps" if fit.checkpoint_steps else "no",
        "save_steps": fit.checkpoint_steps or 500,
        # two: the last may have been cut off while it was written
        "save_total_limit": 2,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # the default shows the mean so far instead of a NaN
        "report_to": "none",
        "disable_tqdm": True,
    }


def set_attention(model: torch.nn.Module, kernel: str) -> None:
    """Give a model another attention kernel; raises `ModelError` where it has none of the kind."""
    # PEFT's wrapper has a configuration of its own, which knows no kernels
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if inner.config._attn_implementation == kernel:
        return
    try:
        inner.set_attn_implementation(kernel)
    except (ValueError, ImportError) as error:
        raise ModelError(f"attention={kernel}: {str(error).splitlines()[0]}") from None
