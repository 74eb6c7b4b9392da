"""Names against PEFT's own matching."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from lorazor.naming import exact_keys, exact_targets

NAMES = ("encoder.layers.0.fc", "encoder.layers.1.fc", "text.encoder.layers.0.fc", "encoder.layers.0_fc", "lm_head")


@pytest.mark.parametrize("kept", [NAMES[:1], NAMES[1:3], NAMES[::-1], ("encoder.layers.0.fc", "lm_head")])
def test_peft_finds_the_kept_names_and_no_other(kept):
    config = LoraConfig(target_modules=exact_targets(kept, NAMES))
    assert {name for name in NAMES if check_target_module_exists(config, name)} == set(kept)


def test_a_list_keeps_its_order_and_is_used_where_it_can_be():
    assert exact_targets(NAMES[1::-1], NAMES[:2]) == list(NAMES[1::-1])
    assert isinstance(exact_targets(NAMES[:1], NAMES), str)


@pytest.mark.parametrize("everything", [NAMES, ("encoder.layers.0.fc", "encoder.layers.1.fc", "lm_head")])
def test_a_key_is_for_one_module(everything):
    keys = exact_keys(everything)
    assert list(keys) == list(everything)
    for name, key in keys.items():
        assert [other for other in everything if get_pattern_key([key], other) == key] == [name]


def test_older_peft_reads_the_keys_too():
    """PEFT 0.12, `tuners/lora/model.py`: the first key that matches behind a prefix, or else the name itself."""
    names = ("model.layers.0.q_proj", "model.layers.0.k_proj", "model.layers.10.q_proj", "lm_head")
    ranks = {name: 2 + place for place, name in enumerate(names)}
    keys = exact_keys(names)
    pattern = {keys[name]: rank for name, rank in ranks.items()}
    for name in names:
        found = next((key for key in pattern if re.match(rf".*\.{key}$", name)), name)
        assert pattern.get(found, 8) == ranks[name]


def test_names_of_a_text_model_beside_those_of_a_vision_model():
    layers = [
        f"{place}.layers.{layer}.q_proj" for place in ("language_model.model", "vision_model.model") for layer in (0, 1)
    ]
    kept = [layers[0], layers[2]]
    config = LoraConfig(target_modules=exact_targets(kept, layers))
    assert [name for name in layers if check_target_module_exists(config, name)] == kept
    for name, key in exact_keys(layers).items():
        assert [other for other in layers if get_pattern_key([key], other) == key] == [name]


@given(st.lists(st.text(alphabet="ab.0-", min_size=1, max_size=7), min_size=1, max_size=8, unique=True))
def test_any_names_have_keys_of_their_own_and_plain_ones_where_nothing_else_matches(names):
    keys = exact_keys(names)
    for name in names:
        others = [other for other in names if other != name]
        is_plain = "-" not in name and not any(re.fullmatch(rf"(.*\.)?({name})", other) for other in others)
        assert keys[name] == (name if is_plain else f"^{re.escape(name)}")


def test_two_thousand_names_take_no_time():
    """Each of them compared with all others took 6 s, of experts that all end alike."""
    names = [f"model.layers.{layer}.mlp.experts.{expert}.w1" for layer in range(32) for expert in range(64)]
    start = time.process_time()
    assert exact_keys(names)[names[0]] == names[0]
    assert exact_targets(names[::2], names) == names[::2]
    assert time.process_time() - start < 1
