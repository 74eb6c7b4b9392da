"""Names against PEFT's own matching."""

from __future__ import annotations

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from lorazor.naming import exact_key, exact_targets

NAMES = ("encoder.layers.0.fc", "encoder.layers.1.fc", "text.encoder.layers.0.fc", "encoder.layers.0_fc", "lm_head")


@pytest.mark.parametrize("kept", [NAMES[:1], NAMES[1:3], NAMES[::-1], ("encoder.layers.0.fc", "lm_head")])
def test_peft_finds_the_kept_names_and_no_other(kept):
    config = LoraConfig(target_modules=exact_targets(kept, NAMES))
    assert {name for name in NAMES if check_target_module_exists(config, name)} == set(kept)


def test_a_list_keeps_its_order_and_is_used_where_it_can_be():
    assert exact_targets(NAMES[1::-1], NAMES[:2]) == list(NAMES[1::-1])
    assert isinstance(exact_targets(NAMES[:1], NAMES), str)


@pytest.mark.parametrize("name", NAMES)
def test_a_key_is_for_one_module(name):
    assert [other for other in NAMES if get_pattern_key([exact_key(name)], other) == exact_key(name)] == [name]
