"""Model FLOPs against torch's own counter, for full and for adapters of every layout."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from kit.train.flops import measured_peak, model_flops, naive_6n

ROWS, LENGTH = 2, 32


def llama(tied=True, layers=3):
    torch.manual_seed(0)
    # the counter does not see the CPU's fused attention, and counts full attention
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
            attn_implementation="eager",
        )
    )


def lora(model, **options):
    return get_peft_model(
        model, LoraConfig(r=4, task_type="CAUSAL_LM", **{"target_modules": "all-linear", **options})
    )


def counted_by_torch(model):
    ids = torch.randint(0, 512, (ROWS, LENGTH))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return counter.get_total_flops()


LAYOUTS = {
    "full": lambda m: m,
    "lora": lora,
    "lora on queries and values": lambda m: lora(m, target_modules=["q_proj", "v_proj"]),
    "lora on the top layer": lambda m: lora(m, target_modules=["q_proj", "up_proj"], layers_to_transform=[2]),
    "lora on down projections": lambda m: lora(m, target_modules=["down_proj"]),
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_within_one_percent_of_the_counter(layout, tied):
    model = LAYOUTS[layout](llama(tied))
    truth = counted_by_torch(model)
    found = model_flops(model, causal=False).total(ROWS * LENGTH, ROWS * LENGTH**2)
    assert found == pytest.approx(truth, rel=0.01)


def test_full_is_six_and_lora_is_four_per_frozen_parameter():
    full, adapted = model_flops(llama()), model_flops(lora(llama()))
    assert full.weights == 6 * full.trained
    assert full.frozen == 0
    # the queries, keys and values of the first layer get no input gradient: nothing below them is trained
    assert 3.8 < (adapted.weights - 6 * adapted.trained) / adapted.frozen < 4.0


def test_below_the_lowest_trained_layer_only_the_forward_pass_costs():
    top = model_flops(lora(llama(layers=4), target_modules=["q_proj"], layers_to_transform=[3]))
    every = model_flops(lora(llama(layers=4)))
    assert top.weights < 0.8 * every.weights
    assert top.forward_weights == pytest.approx(2 * (top.trained + top.frozen))


def test_causal_attention_is_half_and_packed_rows_count_their_own_squares():
    full, half = model_flops(llama(), causal=False), model_flops(llama(), causal=True)
    assert half.total(100, 5000) - half.weights * 100 == (full.total(100, 5000) - full.weights * 100) / 2
    assert half.total(200, 2 * 100**2) == 2 * half.total(100, 100**2)
    assert "causal (half)" in half.convention
    assert "attention full" in full.convention


def test_dora_counts_like_lora_and_its_norms_do_not_count_per_token():
    assert model_flops(lora(llama(), use_dora=True)).weights == model_flops(lora(llama())).weights


def test_naive_6n_overstates_lora():
    model = lora(llama())
    assert naive_6n(model) >= 1.3 * model_flops(model).weights


def test_the_probe_leaves_the_model_as_it_was():
    model = lora(llama()).train()
    model_flops(model)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_peak_is_a_positive_rate():
    assert measured_peak(64, torch.float32, seconds=0.01) > 0
