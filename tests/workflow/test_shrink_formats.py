"""Number formats of the file: what is judged is what is written, and stock PEFT computes it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorazor.errors import SelectionError
from lorazor.settings import ShrinkSettings
from lorazor.workflow.candidates import Candidates
from lorazor.workflow.shrink import shrink
from tests.workflow.planted import WEIGHTS, Planted, change
from tests.workflow.shrinking import rows, run, run_losses, stock_losses

HEALING: dict[str, Any] = {"heal_from": "labels", "heal_steps": 8, "heal_lr": 5e-3}


def cast(adapter: Path, to: Path, dtype: torch.dtype) -> Path:
    shutil.copytree(adapter, to)
    tensors = {key: tensor.to(dtype) for key, tensor in load_file(to / WEIGHTS).items()}
    save_file(tensors, to / WEIGHTS, metadata={"format": "pt"})
    return to


def dtypes_of(folder: Path) -> set[torch.dtype]:
    return {tensor.dtype for tensor in load_file(folder / WEIGHTS).values()}


def check_losses(tiny, one: Planted, out: Path) -> None:
    """On both sets, what the run measured of its choice is what stock PEFT computes with the file, to rounding."""
    for prefix, data in (("", one.data), ("confirm-", one.held_out)):
        assert run_losses(out, prefix) == pytest.approx(stock_losses(tiny.base, out / "adapter", data), abs=1e-4)


@pytest.mark.parametrize(
    ("source", "asked", "written"),
    [
        (torch.float32, "bfloat16", torch.bfloat16),
        pytest.param(torch.float32, "float16", torch.float16, marks=pytest.mark.slow),
        (torch.bfloat16, "keep", torch.bfloat16),
        pytest.param(torch.bfloat16, "float32", torch.float32, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("goal", [{"params_fraction": 0.4}, {"margin": "40%"}], ids=str)
def test_what_is_judged_is_what_is_written(tiny, gaining, tmp_path, source, asked, written, goal):
    one = dataclasses.replace(gaining, adapter=cast(gaining.adapter, tmp_path / "adapter", source))
    result = run(one, tmp_path / "out", confirm=True, weights_dtype=asked, **goal)
    if result.pruned is None:  # not shown on so few held-out examples
        assert "margin" in goal and result.verdict is not None and not (tmp_path / "out" / "adapter").exists()
        return
    assert dtypes_of(result.pruned.path) == {written}
    check_losses(tiny, one, tmp_path / "out")
    assert result.pruned.n_bytes == (tmp_path / "out" / "adapter" / WEIGHTS).stat().st_size
    full = stock_losses(tiny.base, one.adapter, gaining.held_out)
    measured = rows(tmp_path / "out" / "confirm-losses.jsonl")
    n_tokens = sum(row["n_tokens"] for row in measured if row["adapter"] == "full")
    assert result.verdict is not None
    assert result.verdict.full_value == pytest.approx(sum(full.values()) / n_tokens, abs=1e-5)
    assert not (tmp_path / "out" / "written").exists()


def test_a_healed_adapter_is_rounded_before_it_is_measured(tiny, gaining, train, out):
    result = run(gaining, out, confirm=True, params_fraction=0.1, weights_dtype="bfloat16", heal=train, **HEALING)
    assert json.loads((out / "shrink.json").read_text())["chosen"] == "chosen, healed"
    assert dtypes_of(out / "adapter") == {torch.bfloat16} and "healed, in bfloat16" in result.reason
    check_losses(tiny, gaining, out)


def test_a_size_counts_the_bytes_of_the_format(gaining, tmp_path):
    """All of a float32 adapter fits into 70 % of its file in bfloat16, each number rounded by torch itself."""
    before = gaining.adapter / WEIGHTS
    sized = {"size": f"{round(0.7 * before.stat().st_size)}B", "weights_dtype": "bfloat16"}
    result = shrink(gaining.adapter, out=tmp_path / "a", settings=ShrinkSettings(**sized))
    assert result.pruned is not None and result.pruned.n_parameters_kept == result.pruned.n_parameters
    assert result.pruned.n_bytes <= 0.7 * result.pruned.n_bytes_before and "in bfloat16" in result.reason
    seen = load_file(result.pruned.path / WEIGHTS)
    for key, tensor in load_file(before).items():
        assert torch.equal(seen[key], tensor.to(torch.bfloat16))
    half = shrink(gaining.adapter, out=tmp_path / "b", settings=ShrinkSettings(**sized | {"size": "16KB"})).pruned
    assert half is not None and 12_000 <= half.n_bytes <= 16_000 and dtypes_of(half.path) == {torch.bfloat16}


def test_numbers_that_do_not_fit_are_said(gaining, tmp_path):
    large = change(gaining.adapter, tmp_path / "large", lambda site, A, B: (A * 1e-6, B * 1e6))
    with pytest.raises(SelectionError, match="overflows torch.float16. Use .* a wider number format"):
        shrink(large, out=tmp_path / "out", settings=ShrinkSettings(params_fraction=1.0, weights_dtype="float16"))


def test_a_larger_adapter_that_alone_is_shown_has_its_written_form_measured(gaining, out, monkeypatch):
    """Where the proposal is not shown on held-out examples, a larger candidate stays, rounded like the proposal."""
    on_held_out, asked = Candidates.on_held_out, []

    def only_the_first(self, variant, margin):
        asked.append(variant)
        verdict = on_held_out(self, variant, margin)
        return dataclasses.replace(verdict, outcome="shown" if len(asked) == 1 else "undecided")

    monkeypatch.setattr(Candidates, "on_held_out", only_the_first)
    result = run(gaining, out, confirm=True, margin="40%", weights_dtype="bfloat16")
    assert len(asked) == 2 and result.verdict is not None and result.verdict.outcome == "shown"
    assert result.pruned is not None and dtypes_of(out / "adapter") == {torch.bfloat16}
    chosen = json.loads((out / "shrink.json").read_text())["chosen"]
    assert chosen in {one.label for one in result.candidates}
