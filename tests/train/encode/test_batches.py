"""Batches: padding to a given length, packed positions, and which positions predict a token that counts."""

import math

import torch

from kit.train.encode.batches import (
    IGNORED,
    collate_packed,
    packed_lengths,
    padded_batch,
    predicted_tokens,
    summed_loss,
)

PACKED = [
    {"input_ids": [5, 6, 7, 8, 9], "labels": [5, 6, 7, 8, 9], "seq_lengths": [3, 2]},
    {"input_ids": [5, 6], "labels": [5, 6], "seq_lengths": [2]},
]


def test_a_given_length_adds_padding_that_is_no_document_and_is_not_predicted():
    batch = collate_packed(PACKED, pad=0, length=7)
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 7)
    assert batch["position_ids"][0].tolist() == [0, 1, 2, 0, 1, 0, 0]
    assert batch["labels"][0].tolist() == [IGNORED, 6, 7, IGNORED, 9, IGNORED, IGNORED]
    assert sorted(packed_lengths(batch["position_ids"]).tolist()) == [2, 2, 3]


def test_what_predicts_is_what_stands_before_a_token_that_counts():
    _, _, labels = padded_batch(
        [{"input_ids": [4, 5, 6], "labels": [IGNORED, 5, 6]}, {"input_ids": [7, 8], "labels": [7, IGNORED]}],
        pad=0,
    )
    places = torch.arange(6).reshape(2, 3)
    before, tokens = predicted_tokens(places, labels)
    assert (before.tolist(), tokens.tolist()) == ([0, 1], [5, 6])


def test_the_loss_is_summed_in_float32_over_the_tokens_that_count():
    logits = torch.zeros(3, 8, dtype=torch.bfloat16)
    loss = summed_loss(logits, torch.tensor([1, IGNORED, 7]))
    assert loss.dtype == torch.float32
    assert math.isclose(loss.item(), 2 * math.log(8), rel_tol=1e-6)
