"""Writing after prompts: the same alone and in a batch, from the token ids as they are, with settings that hold."""

import torch
from support import TEXT, tiny_model

from kit.train.models import load
from kit.train.models.generate import REPETITION_PENALTY, for_readers, generate


def loaded():
    return load.load_model(tiny_model(), dtype="float32"), load.load_tokenizer(tiny_model())


def test_a_batch_of_unlike_lengths_is_written_as_each_prompt_alone_and_the_mode_comes_back():
    model, tokenizer = loaded()
    prompts = [tokenizer(text)["input_ids"] for text in (TEXT[0], TEXT[0][:9])]
    model.train()
    together = generate(model, tokenizer, prompts, 6, do_sample=False).tokens
    assert model.training
    alone = [generate(model, tokenizer, [p], 6, do_sample=False).tokens[0] for p in prompts]
    assert together == alone
    assert all(len(row) == 6 for row in together)


def test_a_padding_token_inside_a_prompt_is_read():
    model, tokenizer = loaded()
    plain = tokenizer(TEXT[0])["input_ids"]
    marked = [*plain[:4], tokenizer.pad_token_id, *plain[4:]]
    read = generate(model, tokenizer, [marked, plain], 1, first_logits=True, do_sample=False).first_logits
    expected = model(input_ids=torch.tensor([marked])).logits[0, -1]
    torch.testing.assert_close(read[0], expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(read[0], read[1])


def test_settings_for_readers_draw_only_above_temperature_zero():
    _, tokenizer = loaded()
    drawn, likeliest = for_readers(tokenizer, 0.7), for_readers(tokenizer, 0.0)
    assert drawn["do_sample"] and drawn["temperature"] == 0.7
    assert not likeliest["do_sample"] and "temperature" not in likeliest
    assert drawn["repetition_penalty"] == likeliest["repetition_penalty"] == REPETITION_PENALTY > 1
