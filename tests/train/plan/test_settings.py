"""The kit's recipe beside TRL's own: what STOCK says is what TRL does, every entry switches, nothing changes the loss."""

import re

import pytest
import torch
import trl.trainer.utils
from peft import get_peft_model
from support import make_lake, sft_params, tiny_model
from trl import SFTConfig

from kit.errors import ModelError
from kit.params import FinetuneSft
from kit.train.loop import meter
from kit.train.models import load
from kit.train.models.methods import adapter_config
from kit.train.plan import fit, settings
from kit.train.plan.machine import Machine
from kit.train.plan.setup import resolve_setup
from kit.train.tune import sft
from kit.train.tune.sft import finetune


def test_stock_is_what_trl_does_unasked(tmp_path):
    given = SFTConfig(output_dir=str(tmp_path), use_cpu=True)
    assert given.bf16 is settings.STOCK["autocast"]
    assert given.activation_checkpointing is settings.STOCK["activation_checkpointing"]
    assert given.packing is settings.STOCK["packing"]
    assert given.torch_compile is settings.STOCK["compile"]
    assert str(given.optim.value) == settings.STOCK["optimizer"]
    assert SFTConfig.dataloader_pin_memory is settings.STOCK["pin_memory"]
    assert settings.STOCK["loss_tile"] == trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE
    model = trl.trainer.utils.create_model_from_path(tiny_model(), device_map=None)
    assert str(model.dtype) == f"torch.{settings.STOCK['weights']}"
    assert model.config._attn_implementation == settings.STOCK["attention"]
    tuned = get_peft_model(model.to(torch.bfloat16), adapter_config(FinetuneSft()))
    layer = next(m for m in tuned.modules() if hasattr(m, "lora_A"))
    adapter = layer.lora_A["default"].weight  # in float32 over weights in bfloat16
    assert str(layer._cast_input_dtype(torch.zeros(1, dtype=torch.bfloat16), adapter.dtype).dtype) == (
        f"torch.{settings.STOCK['adapter_inputs']}"
    )


def test_the_recipe_by_machine_and_method():
    made = {(full, gpu): settings.recipe(full=full, gpu=gpu, steps=500) for full in (0, 1) for gpu in (0, 1)}
    assert all(set(m) == set(settings.STOCK) for m in made.values())
    # frozen weights in bfloat16, trained ones never
    assert [made[k]["weights"] for k in ((0, 0), (0, 1))] == ["bfloat16"] * 2
    assert [made[k]["weights"] for k in ((1, 0), (1, 1))] == ["float32"] * 2
    assert [bool(m["autocast"]) for m in made.values()] == [False, True, True, True]
    assert [bool(m["compile"]) for m in made.values()] == [False, True, False, True]
    assert not settings.recipe(full=False, gpu=True, steps=8)["compile"]
    assert settings.recipe(full=False, gpu=False, compile_model="on")["compile"]
    assert settings.recipe(full=True, bf16=False)["autocast"] is False
    assert settings.recipe(full=False, gpu=False)["loss_tile"] < settings.STOCK["loss_tile"]


def test_a_kernel_that_is_not_here_is_refused_in_one_line(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("FlashAttention may be here")
    with pytest.raises(ModelError, match=re.escape("attention=flash_attention_2 needs a GPU")):
        finetune(sft_params(make_lake(tmp_path), attention="flash_attention_2"), make_lake(tmp_path))


def test_every_switch_changes_what_ran_and_not_the_loss(tmp_path):
    lake = make_lake(tmp_path)
    usual = finetune(sft_params(lake), lake).metrics
    assert usual["what_ran"]["optimizer"] == "AdamW" and usual["what_ran"]["attention"] == "sdpa"
    assert usual["what_ran"]["batch"] == 2 and not usual["what_ran"]["compiled"]
    eager = finetune(sft_params(lake, attention="eager"), lake).metrics
    assert eager["what_ran"]["attention"] == "eager"
    assert eager["losses"] == pytest.approx(usual["losses"], rel=1e-5)
    plain = fitted(lake, tmp_path, {"optimizer": "adamw_torch", "loss_tile": 64})
    assert plain["losses"] == pytest.approx(usual["losses"], rel=1e-5)


def fitted(lake, folder, changes, **values):
    p = sft_params(lake, **values)
    tokenizer = load.load_tokenizer(p.base_model)
    rows = lake.table(lake.need("sample", "50_build_datasets"), "train").to_pylist()
    train = sft.prepare(rows, tokenizer, p.max_tokens)
    return sft.fit_rows(p, tokenizer, train, train, folder / "work", changes).metrics


def test_adapters_under_autocast_take_bfloat16_and_are_put_back(tmp_path):
    """What a GPU does, on a CPU: float32 adapters over bfloat16 weights, no copy of their inputs in float32."""
    changes = {"autocast": True, "adapter_inputs": "autocast"}
    m = fitted(make_lake(tmp_path), tmp_path, changes, dtype="bfloat16", sft_steps=12, sft_learning_rate=1e-2)
    assert m["what_ran"]["computes_in"] == "bfloat16"
    assert m["perplexity_after"] < 0.95 * m["perplexity_before"]
    model = m["trainer"].model
    adapters = [w for n, w in model.named_parameters() if "lora_" in n]
    assert adapters and all(w.dtype == torch.float32 for w in adapters)
    assert all(x.cast_input_dtype_enabled for x in model.modules() if hasattr(x, "lora_A"))


def test_a_steps_time_is_told_by_its_parts(tmp_path):
    lake = make_lake(tmp_path)
    manifest = finetune(sft_params(lake, gradient_accumulation=2), lake)
    for step in lake.table(manifest, "steps").to_pylist():
        parts = [step[f"{part}_seconds"] for part in (*meter.PARTS, "idle")]
        assert min(parts) >= 0
        assert sum(parts) == pytest.approx(step["seconds"])
        assert step["forward_seconds"] > 0 < step["backward_seconds"]
        assert step["optimizer_seconds"] > 0 < step["data_seconds"]
    assert set(manifest.metrics["seconds_a_step"]) == {*meter.PARTS, "idle"}


def test_batch_0_is_what_the_memory_takes_and_a_killed_run_keeps_it(tmp_path, capsys, monkeypatch):
    p = sft_params(make_lake(tmp_path), sft_batch_size=0)
    lengths = [40] * 50

    def found(megabytes, tokens=16_384):
        monkeypatch.setattr(sft, "PASS_TOKENS", tokens)
        machine = Machine("x", megabytes, 1e9, 10.0, gpu=False)
        return sft.largest_batch(resolve_setup(p, machine=machine), lengths)

    assert found(1e6) == 256 and found(1e6, tokens=100) == 2, "no more than a pass needs"
    rows = found(900)
    assert 1 <= rows < 256 and rows & (rows - 1) == 0, "a power of two"
    setup = resolve_setup(p, machine=Machine("x", 900, 1e9, 10.0, gpu=False))
    sizes = [fit.plan_training(setup.with_rows(n), lengths) for n in (rows, 2 * rows)]
    assert sizes[0].memory_mb <= 0.8 * 900 < sizes[1].memory_mb
    assert found(1.0) == 1, "whether one row fits is the plan's to say"
    monkeypatch.setattr(sft, "PASS_TOKENS", 160)
    taken = sft.with_batch(setup, lengths, tmp_path)
    assert taken.fit.rows == 4 and "batch: 4 rows a pass, 1 passes a step" in capsys.readouterr().out
    monkeypatch.setattr(sft, "PASS_TOKENS", 16_384)
    assert sft.with_batch(setup, lengths, tmp_path).fit.rows == 4
    chosen = resolve_setup(p.model_copy(update={"sft_batch_size": 3}))
    assert sft.with_batch(chosen, lengths, tmp_path).fit.rows == 3


def test_a_run_with_batch_0_says_which_it_took(tmp_path):
    lake = make_lake(tmp_path)
    manifest = finetune(sft_params(lake, sft_batch_size=0, sft_steps=1, packing=False), lake)
    assert manifest.metrics["what_ran"]["batch"] >= 8
    assert manifest.counts.records_out == 8


def test_documents_for_flash_attention_are_one_row_with_its_boundaries():
    """FlashAttention tells documents apart in a batch of one row only: `[rows, tokens]` would leak without a word."""
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8], "seq_lengths": [3, 1]},
            {"input_ids": [9, 4], "labels": [9, 4], "seq_lengths": [2]}]  # fmt: skip
    batch = sft.collator(True, "flash_attention_2", 0)(rows)
    assert batch["input_ids"].shape == (1, 6)
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 4, 6]
    assert sft.collator(True, "sdpa", 0)(rows)["input_ids"].shape == (2, 4)
    assert sft.collator(False, "flash_attention_2", 0) is None


@pytest.mark.slow
def test_compiled_layers_change_nothing_but_speed(tmp_path):
    lake = make_lake(tmp_path)
    plain = finetune(sft_params(lake), lake).metrics
    m = finetune(sft_params(lake, compile_model="on"), lake).metrics
    assert m["what_ran"]["compiled"]
    assert m["losses"] == pytest.approx(plain["losses"], rel=1e-4)
