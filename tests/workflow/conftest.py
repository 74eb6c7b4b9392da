"""An adapter that gains on data, and data to heal it on."""

from __future__ import annotations

import shutil

import pytest

from tests.workflow.planted import Planted, plant


@pytest.fixture(scope="module")
def gaining(tiny, tmp_path_factory) -> Planted:
    """The adapter of the tests, and data on which it gains."""
    root = tmp_path_factory.mktemp("gaining")
    return plant(tiny.base, shutil.copytree(tiny.adapter, root / "adapter"), root)


@pytest.fixture(scope="module")
def train(tiny, gaining, tmp_path_factory) -> str:
    from tests.workflow.planted import answers_of, write_pairs

    prompts = [f"after {number} comes" for number in range(40, 56)]
    answers = answers_of(tiny.base, gaining.adapter, prompts)
    return write_pairs(tmp_path_factory.mktemp("train") / "train.jsonl", prompts, answers)
