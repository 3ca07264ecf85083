"""A model looked at without its weights: what it is made of, what training keeps, and its FLOPs.

From the configuration two small copies, of one layer and of two, are run on tensors without data (torch's
FakeTensorMode), wrapped by PEFT as the run will be. What autograd saves and what is trained is counted, and a middle
layer's share taken times the layers. So it holds for any architecture of like layers, and for every method.
"""

from __future__ import annotations

import argparse
import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from kit import resolve_path
from kit.params import Tuning
from kit.train.models import load, shipped
from kit.train.models.describe import with_layers
from kit.train.models.methods import adapter_config
from kit.train.models.quantise import quantisable
from kit.train.plan.flops import ModelFlops, deeper, model_flops, virtual_tokens

LLAMA = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_3 = LLAMA | {"intermediate_size": 14336, "vocab_size": 128256, "num_key_value_heads": 8}
FACTS: dict[str, dict[str, Any]] = {
    "Llama-2-7b": LLAMA | {"intermediate_size": 11008, "vocab_size": 32000, "max_position_embeddings": 4096},
    "Llama-3-8B": LLAMA_3 | {"max_position_embeddings": 8192},
    "Llama-3.1-8B": LLAMA_3 | {"max_position_embeddings": 131072},
    "Qwen2.5-7B": {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "vocab_size": 152064,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    },
}
"""Public facts of models that need a licence or a network to fetch; what their config.json says."""


def read_config(name: str, trust_remote_code: bool = False) -> PretrainedConfig:
    """The configuration of `name`, of the `FACTS` without asking anybody; raises `ModelError`."""
    short = re.sub(r"^.*/(Meta-)?|(-Instruct|-chat)?(-hf)?$", "", name)
    if short in FACTS and not Path(resolve_path(name)).is_dir():
        return AutoConfig.for_model(**FACTS[short])
    return load.open_pretrained(AutoConfig, name, trust_remote_code)


@dataclass(frozen=True)
class Seen:
    """A model as it will be trained. `layer` is a middle one; saved: bytes kept for the backward pass, fixed and a token."""

    linear: float
    other: float
    trained: float
    saved: float
    saved_token: float
    layer_saved: float
    layer_saved_token: float
    flops: ModelFlops
    layers: int
    hidden: int
    vocab: int
    widest: int
    largest: int
    virtual: int


@functools.cache
def look(
    base: str, remote: bool, method: str, lora_r: int, virtual: int, dtype: torch.dtype, mixed: bool
) -> Seen:
    """The model of `base` under `method`, weights in `dtype`; `mixed`: it computes in bfloat16 beside them."""
    config = read_config(base, remote)
    p = Tuning(method=method, lora_r=lora_r, virtual_tokens=virtual, trust_remote_code=remote)
    # two small copies: their difference is one middle layer, whatever embedding and head weigh
    (one, model, shallow), (two, _, deep) = (_counted(config, layers, p, dtype, mixed) for layers in (1, 2))
    text, layer = config.get_text_config(), two - one
    linear, other, trained, saved, token = (one + layer * (text.num_hidden_layers - 1)).tolist()
    inner = quantisable(model).values()
    return Seen(
        linear=linear,
        other=other,
        trained=trained,
        saved=saved,
        saved_token=token,
        layer_saved=layer[3],
        layer_saved_token=layer[4],
        flops=deeper(shallow, deep, text.num_hidden_layers),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        vocab=text.vocab_size,
        widest=max(max(m.in_features, m.out_features) for m in inner),
        largest=max(m.in_features * m.out_features for m in inner),
        virtual=virtual_tokens(model),
    )


def _counted(
    config: PretrainedConfig, layers: int, p: Tuning, dtype: torch.dtype, mixed: bool
) -> tuple[np.ndarray, nn.Module, ModelFlops]:
    """Weights and bytes saved, the model cut to `layers`, and its FLOPs."""
    had = config.get_text_config().num_hidden_layers
    config = with_layers(config, [min(i, had - 1) for i in range(layers)])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=p.trust_remote_code)
        linear = sum(m.weight.numel() for m in quantisable(model).values())
        total = sum(w.numel() for w in model.parameters())
        adapter = adapter_config(p)
        model = get_peft_model(model, adapter) if adapter else model
    with FakeTensorMode(allow_non_fake_inputs=True):
        _without_data(model)
        # a line through two lengths: what is kept whatever the length, and what for each token
        few, many = (_saved(model, tokens, mixed) for tokens in (32, 64))
        flops = model_flops(model)
    trained = sum(w.numel() for w in model.parameters() if w.requires_grad)
    token = (many - few) / 32
    return np.array([linear, total - linear, trained, few - 32 * token, token]), model, flops


def _without_data(model: nn.Module) -> None:
    """Put fake tensors in place of the meta ones: those know which kernels a real device would choose."""
    # by the old tensor's identity: a head that is tied to the embedding must stay the same tensor
    new_of: dict[int, torch.Tensor] = {}
    for store in (s for m in model.modules() for s in (m._parameters, m._buffers)):
        for name, old in store.items():
            if old is not None and id(old) not in new_of:
                new = torch.empty(old.shape, dtype=old.dtype)
                is_parameter = isinstance(old, nn.Parameter)
                new_of[id(old)] = nn.Parameter(new, old.requires_grad) if is_parameter else new
            store[name] = new_of.get(id(old))


def _saved(model: nn.Module, tokens: int, mixed: bool) -> int:
    """Bytes that autograd keeps for the backward pass over one row, weights not counted."""
    weights = {w.untyped_storage()._cdata for w in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    # by storage: several saved tensors may be views of one, which is kept once
    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    row = torch.zeros((1, tokens), dtype=torch.long)
    mask = torch.ones_like(row)
    mask[:, -1] = 0  # with padding, as most batches: without any, SDPA keeps less
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", enabled=mixed),
    ):
        model(input_ids=row, attention_mask=mask, use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())


def random_model(name: str, folder: str) -> Path:
    """Write a model of `name`'s shape with random bfloat16 weights: right for speed and memory, of no use else.

    The tokenizer is the shipped model's, whose entries are fewer. Needs the weights' size in memory and on disk.
    """
    torch.manual_seed(0)
    with load.device():
        model = AutoModelForCausalLM.from_config(read_config(name), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    load.load_tokenizer(shipped.SHIPPED).save_pretrained(folder)
    return Path(folder)


def main(words: list[str] | None = None) -> None:
    """What `python -m kit.train.plan.dry` does with these words."""
    parser = argparse.ArgumentParser(
        prog="python -m kit.train.plan.dry", description="Write a model with random weights."
    )
    parser.add_argument("name", help="a model whose shape it has, such as Llama-3-8B")
    parser.add_argument("folder", help="where it is written")
    asked = parser.parse_args(words)
    print(random_model(asked.name, asked.folder))


if __name__ == "__main__":
    main()
