"""Models with fewer layers, and frozen weights in four bits however they came to be."""

import pytest
import torch
from support import tiny_model
from transformers import Qwen2Config

from kit.params import Tuning
from kit.train.models import load
from kit.train.models.adapters import low_rank
from kit.train.models.describe import with_layers
from kit.train.models.quantise import quantisable, quantise_in_place
from kit.train.plan import dry


def test_a_cut_configuration_says_of_each_kept_layer_what_it_said_before():
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    config = Qwen2Config(num_hidden_layers=4, layer_types=kinds, hidden_size=64, num_attention_heads=4)
    cut = with_layers(config, [0, 3])
    assert (cut.num_hidden_layers, cut.layer_types) == (2, ["full_attention", "sliding_attention"])
    assert (config.num_hidden_layers, config.layer_types) == (4, kinds)
    assert cut.hidden_size == 64


def test_a_model_of_one_layer_whose_kind_is_named_can_be_planned(tmp_path):
    Qwen2Config(
        num_hidden_layers=1,
        layer_types=["full_attention"],
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
    ).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    p = Tuning(method="lora")
    seen = dry.look(str(tmp_path), False, p.method, p.lora_r, p.virtual_tokens, torch.float32, False)
    assert seen.layers == 1
    assert seen.linear == 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128


@pytest.mark.parametrize("kind", ["nf4", "nf4_double"])
def test_quantised_in_place_is_quantised_as_loaded(kind: str):
    loaded = load.load_model(tiny_model(), dtype="bfloat16", quantization=kind)
    made = load.load_model(tiny_model(), dtype="bfloat16")
    quantise_in_place(made, kind, torch.bfloat16, made.device)
    ids = torch.arange(20).reshape(2, 10)
    torch.testing.assert_close(made(input_ids=ids).logits, loaded(input_ids=ids).logits, rtol=0, atol=0)
    assert [m.weight.quant_state.nested for m in quantisable(made).values()] == [kind == "nf4_double"] * 14


def test_the_head_and_what_peft_adds_stay_as_they_are():
    from peft import get_peft_model

    model = get_peft_model(load.load_model(tiny_model(), dtype="float32"), low_rank(4, 8))
    names = quantisable(model)
    assert len(names) == 14
    assert not [name for name in names if "lora_" in name or "head" in name]
