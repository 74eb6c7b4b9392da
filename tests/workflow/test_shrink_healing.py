"""Healing and resuming a shrink: written as it was measured, and the same in the end."""

from __future__ import annotations

import dataclasses
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorazor.workflow.heal as healing
from lorazor.errors import DataError, OutputError, SettingsError
from lorazor.settings import DataSettings, ShrinkSettings
from lorazor.workflow.shrink import shrink
from tests.workflow.planted import WEIGHTS
from tests.workflow.shrinking import READING, rows, run, run_losses, stock_losses


def test_healing_helps_and_is_written_as_it_was_measured(tiny, gaining, train, out):
    settings = {"params_fraction": 0.1, "heal": train, "heal_from": "labels", "heal_steps": 12, "heal_lr": 5e-3}
    result = run(gaining, out, confirm=True, **settings)
    values = {one.label: one.value for one in result.candidates}
    assert values["chosen, healed"] < values["chosen"]
    for prefix, data in (("", gaining.data), ("confirm-", gaining.held_out)):
        expected = stock_losses(tiny.base, out / "adapter", data)
        assert run_losses(out, prefix) == pytest.approx(expected, abs=1e-4)
    assert result.verdict is not None and not (out / "healing").exists()
    # 8 examples: two passes there and back (basis, scores); three adapters on each set; 12 steps of 4 there and back
    assert result.cost is not None
    assert (result.cost.scoring, result.cost.measuring, result.cost.healing) == (2 * 3 * 8, 3 * 8 + 3 * 8, 12 * 4 * 3)
    assert json.loads((out / "shrink.json").read_text())["scoring"]["n_passes"] == 2
    assert result.pruned is not None and result.pruned.n_bytes == (out / "adapter" / WEIGHTS).stat().st_size


@pytest.mark.slow
def test_healing_that_validation_does_not_like_is_not_kept(tiny, gaining, train, out, monkeypatch):
    fit = healing.fit

    def spoiling(*arguments, save_to, **options):
        fitted = fit(*arguments, save_to=save_to, **options)
        tensors = load_file(save_to / WEIGHTS)
        turned = {key: -tensor if "lora_B" in key else tensor for key, tensor in tensors.items()}
        save_file(turned, save_to / WEIGHTS, metadata={"format": "pt"})
        return fitted

    monkeypatch.setattr(healing, "fit", spoiling)
    result = run(gaining, out, params_fraction=0.5, heal=train, heal_steps=2, confirm=True)
    values = {one.label: one.value for one in result.candidates}
    assert not values["chosen, healed"] < values["chosen"]
    assert json.loads((out / "shrink.json").read_text())["chosen"] == "chosen"
    assert run_losses(out) == pytest.approx(stock_losses(tiny.base, out / "adapter", gaining.data), abs=1e-4)
    assert result.verdict is not None


def test_a_step_that_the_processes_cannot_share_is_refused_at_the_door(gaining, train, out, monkeypatch):
    monkeypatch.setattr(healing, "this_process", lambda: SimpleNamespace(num_processes=3))
    with pytest.raises(SettingsError, match="passes of 3 processes each cannot share the batch_size=8"):
        run(gaining, out, heal=train, reading=DataSettings(batch_size=8))
    assert not out.exists()


@pytest.mark.slow
def test_passes_of_a_step_heal_the_same(gaining, train, tmp_path, capfd):
    """Eight examples a step, in one pass and in four; one bar, and a log in the run folder."""
    settings = {"params_fraction": 0.1, "heal": train, "heal_steps": 6, "heal_lr": 2e-3}
    settings["reading"] = DataSettings(batch_size=8)
    for n_passes in (1, 4):
        run(gaining, tmp_path / f"{n_passes}", heal_accumulation=n_passes, **settings)
    one, four = (load_file(tmp_path / n / "adapter" / WEIGHTS) for n in ("1", "4"))
    for name, tensor in one.items():
        torch.testing.assert_close(four[name], tensor, atol=2e-5, rtol=0)
    for log in (rows(tmp_path / n / "healing.jsonl") for n in ("1", "4")):
        assert [entry["step"] for entry in log] == list(range(1, 7)) and log[0]["adapter"] == "chosen"
        assert log[-1]["loss"] < log[0]["loss"]
    printed = capfd.readouterr()
    assert printed.out == "" and "'loss'" not in printed.err and printed.err.count("healing, loss") == 2


def test_equal_norms_change_nothing_but_the_norms(gaining):
    from lorazor.adapter.directions import equal_norms_
    from lorazor.adapter.load import load
    from lorazor.adapter.sites import site_parameters

    loaded = load(gaining.adapter)
    ids = torch.arange(5, 20)[None]
    with torch.no_grad():
        before = loaded.model(input_ids=ids).logits
        equal_norms_(loaded.sites)
        after = loaded.model(input_ids=ids).logits
    torch.testing.assert_close(after, before, atol=1e-5, rtol=0)
    for site in loaded.sites:
        down, up = site_parameters(site.module, site.adapter)
        torch.testing.assert_close(down.norm(dim=1), up.norm(dim=0))


@pytest.mark.slow
def test_an_interrupted_healing_goes_on_and_ends_the_same(gaining, train, tmp_path, monkeypatch):
    """Ctrl-C after a checkpoint; the resumed run takes the steps that are missing, and no score anew."""
    settings = {"params_fraction": 0.2, "heal": train, "heal_steps": 14, "heal_lr": 5e-3}
    whole = run(gaining, tmp_path / "whole", **settings)
    from transformers import TrainerCallback

    fit, scored = healing.fit, []

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 12:  # two after the checkpoint
                raise KeyboardInterrupt

    monkeypatch.setattr(healing, "fit", lambda *args, **options: fit(*args, callbacks=[Stop()], **options))
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(gaining, out, **settings)
    monkeypatch.setattr(healing, "fit", fit)
    monkeypatch.setattr("lorazor.workflow.basis.gram_matrices", lambda *_, **__: scored.append(1))
    everything = ShrinkSettings(**{"reading": READING, "points": 2, **settings})
    resumed = shrink(gaining.adapter, gaining.data, out=out, settings=everything, resume=True)
    assert not scored and [one.value for one in resumed.candidates] == pytest.approx(
        [one.value for one in whole.candidates], abs=1e-6
    )
    expected, seen = (load_file(folder / "adapter" / WEIGHTS) for folder in (tmp_path / "whole", out))
    for name, tensor in expected.items():
        torch.testing.assert_close(seen[name], tensor, atol=1e-6, rtol=0)
    with pytest.raises(OutputError, match="batch_size was 4"):
        changed = dataclasses.replace(everything, reading=DataSettings(batch_size=2))
        shrink(gaining.adapter, gaining.data, out=out, settings=changed, resume=True)


def test_rows_that_cannot_be_healed_on_are_refused_before_anything_is_measured(gaining, tmp_path, out):
    rows_of_labels = tmp_path / "labels.jsonl"
    rows_of_labels.write_text('{"sentence": "fine", "label": 1}\n' * 8)
    with pytest.raises(DataError, match=r"labels.jsonl' cannot be healed on. Example 0"):
        run(gaining, out, params_fraction=0.5, heal=str(rows_of_labels), heal_steps=2)
    assert not out.exists()


@pytest.mark.slow
def test_a_finished_healing_is_the_same_when_it_is_resumed(gaining, train, out):
    settings = {"params_fraction": 0.2, "heal": train, "heal_steps": 4, "heal_lr": 5e-3}
    run(gaining, out, **settings)
    before = {name: (out / name).read_bytes() for name in ("healing.jsonl", "losses.jsonl", f"adapter/{WEIGHTS}")}
    everything = ShrinkSettings(**{"reading": READING, "points": 2, **settings})
    shrink(gaining.adapter, gaining.data, out=out, settings=everything, resume=True)
    assert {name: (out / name).read_bytes() for name in before} == before


# Resuming


def test_a_resumed_run_measures_and_scores_nothing_twice(gaining, out, monkeypatch):
    """Also with another batch size, for which other examples would have been scored."""
    settings = {"margin": "40%", "score_examples": 4}
    first = run(gaining, out, confirm=True, **settings)
    before = (out / "losses.jsonl").read_text(), (out / "selection.json").read_bytes()
    shutil.rmtree(out / "adapter")
    monkeypatch.setattr("lorazor.measure.meter.row_losses", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr("lorazor.workflow.basis.gram_matrices", lambda *_, **__: pytest.fail("scored again"))
    everything = ShrinkSettings(points=2, reading=DataSettings(batch_size=3), **settings)
    again = shrink(gaining.adapter, gaining.data, out=out, confirm=gaining.held_out, settings=everything, resume=True)
    assert ((out / "losses.jsonl").read_text(), (out / "selection.json").read_bytes()) == before
    assert again.candidates == first.candidates and again.verdict == first.verdict
    assert again.loaded_differs_by is not None and again.loaded_differs_by < 1e-4
