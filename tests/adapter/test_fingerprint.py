"""The same base has the same fingerprint, whatever hangs on it and however it was loaded."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

from lorazor.adapter.fingerprint import base_fingerprint
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
