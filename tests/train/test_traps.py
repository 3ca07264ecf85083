"""Contracts with the libraries: each trap that gives a plausible but wrong model has a test here named after it.

Where a test shows that a trap still exists, it does so to prove that the cure is needed: when the library mends it, the
test says so by failing, and the cure can go.
"""

import bitsandbytes as bnb
import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model
from support import TEXT, adapter_folder, make_lake, review, sft_params, tiny_model
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer, pack_dataset

from kit.errors import ModelError
from kit.train.encode import batches, encode
from kit.train.encode.batches import IGNORED
from kit.train.loop import run
from kit.train.models import adapters, load
from kit.train.plan.flops import model_flops, naive_6n
from kit.train.plan.setup import resolve_setup, trainer_arguments
from kit.train.tune.sft import finetune


def gradients(model, ids):
    model.train()
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def qlora(seed=0):
    model = load.load_model(tiny_model(), dtype="float32", quantization="nf4_double")
    torch.manual_seed(seed)
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    return wrapped


def test_trap_1_an_evaluation_on_cpu_leaves_the_gradients_of_qlora_alone():
    ids = torch.arange(32).reshape(2, 16)
    model = qlora()
    layers = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert layers
    assert not any(m.support_avx512bf16_for_cpu for m in layers)
    before = gradients(model, ids)
    with torch.no_grad():
        model.eval()(input_ids=ids)
    after = gradients(model, ids)
    assert (after - before).norm() / before.norm() < 1e-5


def test_trap_2_after_full_fine_tuning_the_reference_is_not_reloaded_from_the_base(tmp_path):
    model = load.load_model(tiny_model(), dtype="float32")
    for weight in model.parameters():
        weight.data += 0.02 * torch.randn_like(weight)  # "tuned"
    model.config._name_or_path = model.name_or_path = tiny_model()
    pairs = datasets.Dataset.from_list(
        [{"prompt": "The", "chosen": f" {TEXT[0]}", "rejected": f" {TEXT[1]}"}] * 2
    )
    with run.quiet():
        stock = DPOTrainer(
            model=model,
            args=DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none"),
            train_dataset=pairs,
            processing_class=load.load_tokenizer(tiny_model()),
        )
    ours, theirs = (m.get_input_embeddings().weight for m in (model, stock.ref_model))
    assert not torch.equal(ours, theirs), (
        "TRL keeps the tuned model as reference now: preference.build need not copy"
    )
    # that the kit's reference is the tuned model: test_preference.py, after full fine-tuning


def packed_batch(tokenizer):
    rows = [encode.encode_row({"prompt": "", "completion": text}, tokenizer, 60) for text in TEXT]
    packed = pack_dataset(datasets.Dataset.from_list(rows), 64, strategy="bfd").to_list()
    assert len(packed) < len(rows)
    return rows, packed


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_trap_3_packed_documents_do_not_see_each_other(kernel):
    tokenizer = load.load_tokenizer(tiny_model())
    model = load.load_model(tiny_model(), dtype="float32").eval()
    model.set_attn_implementation(kernel)
    rows, packed = packed_batch(tokenizer)
    batch = batches.collate_packed(packed, tokenizer.pad_token_id)
    with torch.no_grad():
        together = model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).logits
        for made, row in zip(together, packed, strict=True):
            start = 0
            for length in row["seq_lengths"]:
                alone = model(input_ids=torch.tensor([row["input_ids"][start : start + length]])).logits[0]
                assert torch.allclose(made[start : start + length], alone, atol=1e-4)
                start += length
        with_cache = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=True)
    assert not torch.allclose(with_cache.logits, together, atol=1e-4), (
        "isolation holds with a cache, too, now"
    )
    assert sum(map(len, (r["input_ids"] for r in rows))) == sum(sum(r["seq_lengths"]) for r in packed)


def test_trap_3_the_trainer_turns_the_cache_off(tmp_path, monkeypatch):
    seen = []
    lake = make_lake(tmp_path)
    compute = SFTTrainer.compute_loss

    def look(self, model, inputs, *args, **kwargs):
        found = compute(self, model, inputs, *args, **kwargs)
        seen.append((inputs["use_cache"], "attention_mask" in inputs))
        return found

    monkeypatch.setattr(SFTTrainer, "compute_loss", look)
    finetune(sft_params(lake, packing=True, max_tokens=64, sft_steps=1), lake)
    assert seen == [(False, False)]


def test_trap_3_a_packed_documents_first_token_is_not_predicted_from_the_one_before():
    tokenizer = load.load_tokenizer(tiny_model())
    rows, packed = packed_batch(tokenizer)
    batch = batches.collate_packed(packed, tokenizer.pad_token_id)
    assert (batch["labels"][batch["position_ids"] == 0] == IGNORED).all()
    assert sorted(batches.packed_lengths(batch["position_ids"]).tolist()) == sorted(
        len(r["input_ids"]) for r in rows
    )
    scored = int((batch["labels"] != IGNORED).sum())
    assert scored == sum(encode.counted_tokens(r["labels"]) for r in rows)


def test_trap_4_what_ran_says_how_many_processes_and_in_what_parallelism(tmp_path):
    lake = make_lake(tmp_path)
    ran = finetune(sft_params(lake, sft_steps=1), lake).metrics["what_ran"]
    assert (ran["processes"], ran["parallelism"]) == (1, "none")


def test_trap_5_fully_masked_rows_are_counted_and_trl_still_drops_none_unseen(tmp_path):
    masked = [review(i, " fine", prompt="The film is " * 40) for i in range(3)]
    lake = make_lake(tmp_path, train=[*masked, *(review(9 + i, f" {TEXT[i]}") for i in range(3))])
    manifest = finetune(sft_params(lake), lake)
    assert manifest.counts.dropped["prompt fills max_tokens"] == 3
    assert manifest.metrics["what_ran"]["of these fully masked"] == 3


def test_trap_7_a_gguf_file_is_converted_once_and_can_be_trained(tmp_path, monkeypatch):
    from kit.train.models import shipped

    monkeypatch.setattr(shipped, "CACHE", tmp_path / "cache")
    calls = []

    def convert(gguf, target):  # the conversion itself runs when the shipped model is fetched
        calls.append(gguf)
        load.load_model(tiny_model(), dtype="float32").save_pretrained(target)
        load.load_tokenizer(tiny_model()).save_pretrained(target)
        return target

    monkeypatch.setattr(shipped, "convert_gguf", convert)
    (tmp_path / "some.gguf").write_bytes(b"weights")
    for _ in range(2):
        model = load.load_model(str(tmp_path / "some.gguf"), dtype="float32")
    assert len(calls) == 1
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ModelError, match="there is no GGUF file"):
        load.load_model(str(tmp_path / "other.gguf"))


def test_the_pad_token_is_never_the_end_token_where_another_exists_and_the_end_is_learned():
    tokenizer = load.load_tokenizer(tiny_model())
    row = encode.encode_row({"prompt": "The", "completion": " film"}, tokenizer, 50)
    assert row["labels"][-1] == tokenizer.eos_token_id != tokenizer.pad_token_id


@pytest.mark.parametrize("task", list(encode.TASKS))
def test_the_end_of_an_answer_is_learned_once_in_every_task(task):
    tokenizer = load.load_tokenizer(tiny_model())
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    row = encode.encode_row({"prompt": "The film is", "completion": " slow"}, tokenizer, 80, task)
    learned = [x for x in row["labels"] if x != IGNORED]
    assert learned.count(tokenizer.eos_token_id) == 1
    assert learned[-1] == tokenizer.eos_token_id
    asked = tokenizer.decode(row["input_ids"][: len(row["input_ids"]) - len(learned)])
    assert ("### Answer\n" in asked) == (task == "instruction")
    assert asked.endswith("<|im_start|>assistant\n") == (task == "chat")
    assert (asked == "") == (task == "text")


def test_trl_would_turn_on_bfloat16_and_checkpointing_and_the_kit_does_not(tmp_path):
    p = sft_params(make_lake(tmp_path))
    model = load.load_model(tiny_model(), dtype="float32")
    args = SFTConfig(**trainer_arguments(resolve_setup(p), model, tmp_path))
    assert (args.bf16, args.activation_checkpointing, args.report_to) == (False, False, [])
    stock = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    assert stock.gradient_checkpointing, "TRL no longer turns checkpointing on"


def test_six_n_overstates_lora_and_the_kits_count_does_not():
    model = AutoModelForCausalLM.from_pretrained(tiny_model())
    naive = naive_6n(model)
    lora = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert naive / model_flops(lora).weights > 1.3


def test_the_adapter_of_a_quantised_base_is_trained_in_float32(tmp_path):
    lake = make_lake(tmp_path)
    ran = finetune(sft_params(lake, method="qlora", sft_steps=1), lake).metrics["what_ran"]
    assert ran["parameters_by_dtype"]["float32"] >= ran["trainable"]
    assert "bfloat16" not in ran["parameters_by_dtype"]


def test_merging_a_qlora_adapter_into_the_plain_base_would_be_another_model(tmp_path):
    folder = adapter_folder(tmp_path / "a")
    plain = load.load_model(tiny_model(), dtype="float32", adapters=[folder])
    (folder / adapters.TUNED_ON).write_text('{"base_model": "tiny", "quantization": "nf4"}')
    dequantised = load.load_model(tiny_model(), dtype="float32", adapters=[folder])
    ids = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        a, b = (m.eval()(input_ids=ids).logits for m in (plain, dequantised))
    drift = float((a - b).norm() / b.norm())
    assert 0.01 < drift < 1


def test_rotary_frequencies_stay_in_float32_whatever_the_weights_are(tmp_path):
    folder = adapter_folder(tmp_path / "a")
    for folders in ([], [folder]):
        model = load.load_model(tiny_model(), dtype="bfloat16", adapters=folders)
        assert model.model.rotary_emb.inv_freq.dtype == torch.float32
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
