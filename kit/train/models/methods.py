"""Ways to tune a model, as one table: what is trained, over what base, at what rate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from peft import (
    PeftConfig,
    PeftModel,
    PeftType,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
    initialize_kv_prefix_from_past_key_values,
)

from kit.errors import ModelError
from kit.params import Tuning
from kit.train.models.adapters import low_rank


def _lora(p: Tuning, **more: bool) -> PeftConfig:
    return low_rank(p.lora_r, p.lora_alpha, **more)


def _prompt(p: Tuning) -> PeftConfig:
    return PromptTuningConfig(num_virtual_tokens=p.virtual_tokens, task_type=TaskType.CAUSAL_LM)


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


@torch.no_grad()
def begin_prompt(model: torch.nn.Module, ids: Sequence[int]) -> None:
    """Let a learned prompt or prefix begin as a real one: the embeddings, or keys and values, of the tokens `ids`.

    A random one does harm that takes hundreds of steps to undo (measured with SmolLM2 and a random prefix: a held-out
    loss of 8.0 instead of 4.9 after six). Other methods begin as their papers say.
    """
    config = model.active_peft_config if isinstance(model, PeftModel) else None
    if config is None or not config.is_prompt_learning:
        return
    repeated = [ids[i % len(ids)] for i in range(config.num_virtual_tokens)]
    tokens = torch.tensor([repeated], device=model.device)
    if config.peft_type != PeftType.PREFIX_TUNING:
        embedded = model.get_base_model().get_input_embeddings()(tokens)[0]
        encoder = model.prompt_encoder[model.active_adapter]
        if config.peft_type == PeftType.PROMPT_TUNING:
            encoder.embedding.weight.copy_(embedded)
        else:  # out of a network, whose last layer is solved to give them
            *body, last = encoder.mlp_head
            inner = torch.nn.Sequential(*body)(encoder.embedding.weight).double()
            last.bias.copy_(embedded.mean(dim=0))
            wanted = embedded.double() - last.bias.double()
            # least norm, in float64: LAPACK's last bits differ from run to run
            last.weight.copy_((inner.T @ torch.linalg.solve(inner @ inner.T, wanted)).T)
        return
    with model.disable_adapter():
        past = model.eval()(input_ids=tokens, use_cache=True).past_key_values
    initialize_kv_prefix_from_past_key_values(model, past_key_values=past)
