"""Model FLOPs against torch's own counter: every method of 60, every layout of a model, recomputation, windows."""

import math
from dataclasses import replace

import bitsandbytes  # noqa: F401 (registers the operation that the counter is told of)
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from kit.params import Tuning
from kit.train.loop import meter
from kit.train.models import load
from kit.train.models.methods import METHODS, adapter_config
from kit.train.plan.flops import deeper, model_flops, naive_6n

ROWS, LENGTH, VIRTUAL = 4, 32, 8
BERT = {
    **{"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}
LLAMA = BERT | {"num_key_value_heads": 2}
CLASSES = {"task_type": "SEQ_CLS"}
DISTIL = {"vocab_size": 512, "dim": 128, "hidden_dim": 256, "n_layers": 3, "n_heads": 4}
GPT2 = {"vocab_size": 512, "n_embd": 128, "n_layer": 3, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}


def make(name, **options):
    torch.manual_seed(0)
    use = "SequenceClassification" if options.pop("classes", "Bert" in name) else "CausalLM"
    # the counter does not see the CPU's fused attention; eager it sees, and counts full attention
    config = getattr(transformers, f"{name}Config")(**options, attn_implementation="eager")
    return getattr(transformers, f"{name}LMHeadModel" if name == "GPT2" else f"{name}For{use}")(config)


def llama(**options):
    return make("Llama", **LLAMA | options)


def lora(model, **options):
    options = {"task_type": "CAUSAL_LM", "target_modules": "all-linear"} | options
    return get_peft_model(model, LoraConfig(r=4, **options))


def tuned(method, model):
    config = adapter_config(Tuning(method=method, virtual_tokens=VIRTUAL))
    return get_peft_model(model, config) if config else model


def quantised(kind, folder):
    llama().save_pretrained(folder)
    model = load.load_model(str(folder), quantization=kind, dtype="float32")
    model.config._attn_implementation = "eager"
    return tuned("qlora", model)


def top_layer_only():
    model = llama().requires_grad_(False)
    model.model.layers[-1].requires_grad_(True)
    return model


def counted_by_torch(model, rows=ROWS):
    """FLOPs of a forward and a backward pass over `rows` rows of `LENGTH` tokens."""
    ids = torch.randint(3, 512, (rows, LENGTH))
    labels = ids[:, 0] % 2 if hasattr(model, "score") or hasattr(model, "classifier") else ids
    known = {torch.ops.bitsandbytes.gemm_4bit: lambda x, w, shape, *_, **__: 2 * math.prod((*x[:-1], *shape))}
    with FlopCounterMode(display=False, custom_mapping=known) as counter:
        model.train()(input_ids=ids, labels=labels).loss.backward()
    return counter.get_total_flops()


METHOD = {
    **{method: lambda _, m=method: tuned(m, llama()) for method in METHODS if method != "qlora"},
    **{f"qlora {kind}": lambda d, k=kind: quantised(k, d) for kind in ("nf4", "nf4_double", "int8")},
}
LAYOUT = {
    "untied head": lambda _: llama(tie_word_embeddings=False),
    "wide heads": lambda _: make("Qwen3", **LLAMA, head_dim=64),
    "q, k and v in one": lambda _: make("GPT2", **GPT2),
    "lora, untied head": lambda _: lora(llama(tie_word_embeddings=False)),
    "lora, head trained": lambda _: lora(llama(tie_word_embeddings=False), modules_to_save=["lm_head"]),
    "lora on queries and values": lambda _: lora(llama(), target_modules=["q_proj", "v_proj"]),
    "lora on the top layer": lambda _: lora(llama(), target_modules=["q_proj"], layers_to_transform=[2]),
    "lora on down projections": lambda _: lora(llama(), target_modules=["down_proj"]),
    "top layer only": lambda _: top_layer_only(),
    "llama classifier": lambda _: llama(classes=True),
    "bert": lambda _: make("Bert", **BERT),
    "bert, lora": lambda _: lora(make("Bert", **BERT), target_modules=["query", "value"], **CLASSES),
    "distilbert": lambda _: make("DistilBert", **DISTIL),
}
WINDOWS = {
    "every layer": ("Mistral", LLAMA | {"sliding_window": 48}),
    "some layers": ("Gemma2", LLAMA | {"sliding_window": 48, "head_dim": 32}),
    "to both sides": ("ModernBert", BERT | {"local_attention": 128, "cls_token_id": 1, "sep_token_id": 2}),
    "none": ("Llama", LLAMA),
}


@pytest.mark.parametrize("name", METHOD | LAYOUT)
def test_within_one_percent_of_the_counter(name, tmp_path):
    model = (METHOD | LAYOUT)[name](tmp_path)
    found, truth = model_flops(model, causal=False), counted_by_torch(model)
    ours, runs = found.total([LENGTH] * ROWS), found.hardware([LENGTH] * ROWS)
    print(f"{name:27}{truth:>12,} {ours:>12,.0f} {ours / truth - 1:+.3%}, as run {runs / truth - 1:+.3%}")
    assert runs == pytest.approx(truth, rel=0.001)
    # once a batch PEFT multiplies DoRA's correction out, for its norms: no small part of a few tokens
    once = 2 * truth - counted_by_torch(model, 2 * ROWS) if name == "dora" else 0
    assert ours == pytest.approx(truth - once, rel=0.01)


@pytest.mark.parametrize(
    "name", [*sorted(METHOD.keys() - {"prefix"}), "bert", "bert, lora", "top layer only"]
)
def test_recomputation_is_counted_as_it_runs(name, tmp_path):
    model = (METHOD | LAYOUT)[name](tmp_path)
    model.activation_checkpointing_enable()  # of adapters it lets the embeddings have gradients, too
    found, truth = model_flops(model, causal=False), counted_by_torch(model)
    ours, plain = found.hardware([LENGTH] * ROWS, checkpointing=True), found.hardware([LENGTH] * ROWS)
    print(f"{name:27}{truth:>12,} {ours:>12,.0f} {ours / truth - 1:+.3%}, × {truth / plain:.2f}")
    assert ours == pytest.approx(truth, rel=0.02)
    assert truth > 1.05 * plain


@pytest.mark.parametrize("name", WINDOWS)
def test_attended_pairs_are_those_of_the_masks(name):
    model, length, seen = make(WINDOWS[name][0], **WINDOWS[name][1]), 256, []

    def look(module, args, kwargs):
        mask = kwargs["attention_mask"]
        seen.append(length**2 if mask is None else int((mask == 0).sum()))

    found = model_flops(model)
    for module in model.modules():
        if type(module).__name__.endswith("Attention"):
            module.register_forward_pre_hook(look, with_kwargs=True)
    model.eval()(input_ids=torch.randint(3, 512, (1, length)))
    unattended = length * found.forward.position + found.forward.row
    attended = found.total([length], forward_only=True) - unattended
    assert attended == pytest.approx(4 * 128 * sum(seen), rel=0.01)
    assert (found.window > 0) == (name != "none") and found.causal == (name != "to both sides")
    assert found.total([40]) == replace(found, window=1000).total([40])  # a shorter row does not feel it


def test_full_is_six_and_lora_is_four_per_frozen_parameter():
    full, adapted = model_flops(llama()), model_flops(lora(llama()))
    assert full.weights == 6 * full.trained and full.frozen == 0
    # the queries, keys and values of the first layer get no input gradient: nothing below them is trained
    assert 3.8 < (adapted.weights - 6 * adapted.trained) / adapted.frozen < 4.0
    assert model_flops(tuned("dora", llama())).weights == model_flops(tuned("lora", llama())).weights
    assert naive_6n(lora(llama())) >= 1.3 * adapted.weights


def test_causal_attention_is_half_and_packed_documents_count_their_own_squares():
    full, half = model_flops(llama(), causal=False), model_flops(llama())
    attention = [f.total([100]) - f.weights * 100 for f in (half, full)]
    assert attention[1] == 2 * attention[0]
    assert half.total([60, 40]) - half.weights * 100 == pytest.approx(attention[0] * (0.36 + 0.16))
    assert "causal (half)" in half.convention and "attention full" in full.convention
    assert not model_flops(make("Bert", **BERT)).causal


def test_a_batch_is_metered_without_its_padding_and_with_its_prompt():
    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    assert meter.batch_sizes({"attention_mask": mask}) == ([8, 5], 16)
    packed = {"input_ids": mask, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 0, 0, 0], [*range(8)]])}
    assert meter.batch_sizes(packed) == ([3, 2, 8], 16)
    plain, prompted = (model_flops(m) for m in (llama(), tuned("prompt", llama())))
    assert (prompted.virtual, model_flops(tuned("prefix", llama())).prefix) == (VIRTUAL, VIRTUAL)
    met = meter.metered(prompted, [8, 5], 16, False)
    assert [met[name] for name in ("tokens", "padded_tokens", "squares", "rows")] == [13, 16, 89, 2]
    assert met["forward_flops"] == plain.total([8 + VIRTUAL, 5 + VIRTUAL], forward_only=True)
    # the padding, and the logits a second time
    beside = 3 * prompted.step.position + 2 * prompted.head * (16 + 2 * VIRTUAL)
    assert met["hardware_flops"] == pytest.approx(met["flops"] + beside)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "qlora"])
def test_of_like_layers_two_tell_what_all_cost(method):
    one, two, four = (model_flops(tuned(method, llama(num_hidden_layers=n))) for n in (1, 2, 4))
    assert deeper(one, two, 4) == four


def test_the_probe_leaves_the_model_as_it_was():
    model = lora(llama()).train()
    model_flops(model)
    assert model.training and all(p.grad is None for p in model.parameters())
    assert not any({**m._forward_hooks, **m._forward_pre_hooks} for m in model.modules())
