"""The same base has the same fingerprint, whatever hangs on it and however it was loaded."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from lorazor.adapter.fingerprint import base_fingerprint, sampled_positions
from lorazor.adapter.load import load
from lorazor.settings import ModelSettings


def test_the_same_base_in_other_clothes(tiny):
    plain = AutoModelForCausalLM.from_pretrained(tiny.base)
    expected = base_fingerprint(plain)
    assert base_fingerprint(load(tiny.adapter).model) == expected
    assert base_fingerprint(load(tiny.adapter, ModelSettings(dtype="bfloat16")).model) == expected


def test_another_base(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny.base)
    before = base_fingerprint(model)
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.mul_(1.01)
    assert base_fingerprint(model) != before


def test_weights_that_are_not_loaded_count_by_their_shape(tiny):
    config = AutoModelForCausalLM.from_pretrained(tiny.base).config
    with torch.device("meta"):
        once, again = (AutoModelForCausalLM.from_config(config) for _ in range(2))
    assert base_fingerprint(once) == base_fingerprint(again)


@pytest.mark.parametrize("n_numbers", [1, 2, 15, 16, 17, 28_311_552, 2**33 + 1])
def test_positions_stay_inside(n_numbers):
    positions = sampled_positions(n_numbers)
    assert positions[0] == 0 and positions[-1] == n_numbers - 1
    assert positions == sorted(set(positions)) and len(positions) == min(16, n_numbers)
