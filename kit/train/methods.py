"""Ways to tune a model, as one table: what is trained, over what base, at what rate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from peft import (
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    PromptTuningInit,
    TaskType,
)

from kit.params import Tuning
from kit.train.models import ModelError


def _lora(p: Tuning, **more: bool) -> PeftConfig:
    return LoraConfig(
        r=p.lora_r, lora_alpha=p.lora_alpha, target_modules="all-linear", task_type=TaskType.CAUSAL_LM, **more
    )


def _prompt(p: Tuning) -> PeftConfig:
    # real tokens' embeddings to begin with: a random prompt takes hundreds of steps to stop doing harm
    return PromptTuningConfig(
        num_virtual_tokens=p.virtual_tokens,
        prompt_tuning_init=PromptTuningInit.SAMPLE_VOCAB,
        task_type=TaskType.CAUSAL_LM,
    )


def _ptuning(p: Tuning) -> PeftConfig:
    return PromptEncoderConfig(
        num_virtual_tokens=p.virtual_tokens, encoder_hidden_size=128, task_type=TaskType.CAUSAL_LM
    )


def _prefix(p: Tuning) -> PeftConfig:
    return PrefixTuningConfig(num_virtual_tokens=p.virtual_tokens, task_type=TaskType.CAUSAL_LM)


@dataclass(frozen=True)
class Method:
    """One way to tune: PEFT's configuration (None: all weights), peak learning rate, base, what it is."""

    config: Callable[[Tuning], PeftConfig] | None
    learning_rate: float
    about: str
    quantization: str = "none"
    merges: bool = True


METHODS: dict[str, Method] = {
    "full": Method(None, 5e-5, "all weights"),
    "lora": Method(_lora, 1e-3, "a low-rank correction beside each matrix (Hu et al. 2021)"),
    "qlora": Method(
        _lora, 1e-3, "the same over a base in 4 bits (Dettmers et al. 2023)", quantization="nf4_double"
    ),
    "dora": Method(
        lambda p: _lora(p, use_dora=True), 1e-3, "direction and length of each column (Liu et al. 2024)"
    ),
    "prompt": Method(_prompt, 3e-2, "embeddings in front of the text (Lester et al. 2021)", merges=False),
    "ptuning": Method(_ptuning, 3e-3, "the same, out of a small network (Liu et al. 2021)", merges=False),
    "prefix": Method(
        _prefix, 1e-2, "keys and values in front of every layer (Li and Liang 2021)", merges=False
    ),
}
"""Learning rates are what a dozen steps on the sample's reviews want; published runs are longer and slower."""


def adapter_config(p: Tuning) -> PeftConfig | None:
    """PEFT's configuration for `p.method`; None where all weights are trained."""
    build = METHODS[p.method].config
    return build(p) if build else None


def base_quantization(p: Tuning) -> str:
    """How the base is kept; raises `ModelError` for all weights over a quantised base: they have no gradient."""
    kind = METHODS[p.method].quantization if p.quantization == "auto" else p.quantization
    if kind != "none" and METHODS[p.method].config is None:
        raise ModelError(
            f"method {p.method} trains all weights, which cannot be kept in {kind}: method=qlora"
        )
    return kind


def learning_rate(p: Tuning, given: float) -> float:
    """The rate a person set, or the method's own for 0."""
    return given or METHODS[p.method].learning_rate
