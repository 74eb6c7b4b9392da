"""Shrinking adapters of mixtures of experts, against stock PEFT on what was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorazor.adapter.folder import read_adapter
from tests.data.test_batches import byte_tokenizer
from tests.tiny_mixtures import on_experts, tiny_mixture
from tests.workflow.planted import Planted, answers_of, plant, write_pairs
from tests.workflow.shrinking import run, run_losses, stock_losses

# PEFT 0.21 looks for patterns among modules alone; the ranks are those of the patterns nonetheless.
pytestmark = pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("mixture") / "base"
    tiny_mixture().save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    return base


def planted(base: Path, root: Path, **settings: Any) -> Planted:
    model = on_experts(**settings)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(root / "adapter")
    byte_tokenizer().save_pretrained(root / "adapter")
    return plant(base, root / "adapter", root)


def check_is_what_was_measured(base: Path, one: Planted, out: Path) -> None:
    measured, stock = run_losses(out), stock_losses(base, out / "adapter", one.data)
    assert measured.keys() == stock.keys()
    assert measured == pytest.approx(stock, abs=1e-4)


def test_of_lora_on_experts_alone_directions_are_chosen(base, tmp_path):
    one = planted(base, tmp_path, target_modules=[])
    run(one, tmp_path / "run", params_fraction=0.5)
    before, after = (read_adapter(path).sites for path in (one.adapter, tmp_path / "run" / "adapter"))
    assert 2 * sum(site.n_parameters for site in after) <= sum(site.n_parameters for site in before)
    assert any(site.rank == 1 for site in after)
    check_is_what_was_measured(base, one, tmp_path / "run")


def test_what_keeps_one_of_two_parameters_is_healed(base, tmp_path):
    """While it is measured, the other one is switched off; then the full adapter is put on again, to learn from."""
    one = planted(base, tmp_path)
    prompts = [f"after {number} comes" for number in range(40, 56)]
    train = write_pairs(tmp_path / "train.jsonl", prompts, answers_of(base, one.adapter, prompts))
    run(one, tmp_path / "run", params_fraction=0.4, heal=train, heal_steps=4)
    kinds = {(site.layer, site.kind.rpartition(".")[2]) for site in read_adapter(tmp_path / "run" / "adapter").sites}
    assert (0, "gate_up_proj") in kinds and (0, "down_proj") not in kinds
    check_is_what_was_measured(base, one, tmp_path / "run")
