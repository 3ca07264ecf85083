"""What was trained, apart from its base: how low-rank adapters are set up, saved, merged, and what they were tuned on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType
from transformers import PreTrainedModel

from kit.errors import ModelError
from kit.train.models.describe import computes_in

TUNED_ON = "tuned_on.json"
"""Beside an adapter: the base as a person named it, how it was quantised for the training, and what it computed in."""


def low_rank(rank: int, alpha: int, **more: Any) -> LoraConfig:
    """LoRA's settings for a language model: beside every linear layer but the head, as QLoRA found it to need.

    `alpha` / `rank` scales the correction. (Hu et al. 2021; Dettmers et al. 2023, section 4.)
    """
    return LoraConfig(
        r=rank, lora_alpha=alpha, target_modules="all-linear", task_type=TaskType.CAUSAL_LM, **more
    )


def save_adapter(model: torch.nn.Module, folder: Path, base_model: str, quantization: str = "none") -> Path:
    """Write what was trained: a PEFT adapter, or all weights of a plain model; the same bytes every time.

    PEFT writes sets in hash order, the path of the base on this machine and a model card with versions: the
    first are sorted, the second is `base_model` as a person wrote it, the third is left out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, PeftModel):
        # 'auto' would ask the hub whether the vocabulary has grown
        model.save_pretrained(folder, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        for key in ("target_modules", "modules_to_save", "exclude_modules"):
            if isinstance(config.get(key), list):
                config[key] = sorted(config[key])
        config["base_model_name_or_path"] = base_model
        path.write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        facts = {"base_model": base_model, "quantization": quantization, "dtype": computes_in(model)}
        (folder / TUNED_ON).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    else:
        model.config._name_or_path = base_model
        model.save_pretrained(folder)
    return folder


def merge_adapter(model: PreTrainedModel, folder: str | Path) -> PreTrainedModel | PeftModel:
    """`model` with the PEFT adapter in `folder` added to its weights; a learned prompt, which cannot be, in front.

    Raises `ModelError`.
    """
    if isinstance(model, PeftModel):
        raise ModelError(f"adapter in '{folder}' comes after a learned prompt, which cannot be merged")
    try:
        wrapped = PeftModel.from_pretrained(model, str(folder))
        if wrapped.active_peft_config.is_prompt_learning:
            return wrapped
        # PEFT froze them; what is trained next decides anew
        return wrapped.merge_and_unload(safe_merge=True).requires_grad_(True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"adapter in '{folder}' cannot be merged: {str(error).splitlines()[0]}") from None


def tuned_on(folder: str | Path) -> dict[str, str]:
    """`{"base_model", "quantization", "dtype"}` of an adapter's folder; one from elsewhere: unknown, none, float32."""
    known = {"base_model": "", "quantization": "none", "dtype": "float32"}
    try:
        return known | json.loads((Path(folder) / TUNED_ON).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return known


def widen_trained(model: torch.nn.Module) -> None:
    """Trained weights in float32: TRL rounds the adapter of a quantised base to bfloat16, where small updates vanish."""
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
