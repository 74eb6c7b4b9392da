"""What a subset run reports is what stock PEFT computes with what it writes, and nothing harmful stays in it."""

from __future__ import annotations

import json
import shutil

import pytest

from lorazor.selection import Selection
from lorazor.settings import RefitSettings, SearchSettings, SubsetBudgetSettings
from lorazor.workflow.prune import Choice, prune_adapter
from lorazor.workflow.subset import find_subset
from lorazor.workflow.variants import SubsetSettings
from tests.tiny_folders import write_rows
from tests.workflow.test_subset import TWO_POINTS, loss_of, rows, subset


@pytest.mark.parametrize("settings", [{}, {"by": "group"}, {"verify": 2}, {"ranks": "mixed"}])
def test_what_has_negative_credit_never_stays(tiny, out, settings):
    """However much room there is; and pruning by the scores of the run is the same choice."""
    found = subset(tiny, out, SubsetBudgetSettings(params_fraction=1), searching=SearchSettings(**settings))
    worth = {row["site"]: row["score"] for row in rows(out / "scores.jsonl")}
    assert min(worth.values()) < 0 < found["chosen"]["n_sites"] < 28
    if not settings:
        chosen = Selection.load(out / "selection.json")
        assert {site.name for site in chosen.kept} == {name for name, score in worth.items() if score > 0}
        budget = SubsetBudgetSettings(params_fraction=1)
        messages: list[str] = []
        choice = Choice(scores=out, budget=budget)
        _, pruned = prune_adapter(tiny.adapter, out.parent / "pruned", choice, say=messages.append)
        assert pruned.kept == chosen.kept
        assert messages == [f"{len(chosen.dropped)} of 28 sites score 0 or less, and go whatever the budget."]


@pytest.mark.parametrize("budget", [{"keep": 21}, {"tolerance": "loss"}])
def test_verified_and_refitted_is_measured_as_it_is_written(tiny, out, tmp_path, budget, monkeypatch):
    """The removals are measured without a refit, under gates of their own; what is reported is what stock PEFT has."""
    monkeypatch.setattr("lorazor.workflow.search.is_tolerable", lambda *_: next(answers))
    answers = iter([True, False])
    train = str(write_rows(tmp_path / "train.jsonl", range(20, 26)))
    searching, refitting = SearchSettings(by="layer", verify=2), RefitSettings(train, refit_steps=2, refit_lr=0.5)
    found = subset(tiny, out, SubsetBudgetSettings(**budget), searching=searching, refitting=refitting)
    chosen = found["chosen"]
    assert chosen["value"] == pytest.approx(loss_of(out / "adapter", tiny.base, tiny.validation), rel=1e-5)
    same_sites = [one for one in found["candidates"] if one["n_sites"] == chosen["n_sites"]]
    assert len({one["value"] for one in same_sites}) == len(same_sites) >= 3  # two removals, and one of them refitted
    answers = iter([True, False])
    before = (out / "losses.jsonl").read_text()
    settings = SubsetSettings(SubsetBudgetSettings(**budget), TWO_POINTS, searching, refitting)
    find_subset(tiny.adapter, str(tiny.validation), out, str(tiny.held_out), settings, resume=True)
    assert json.loads((out / "subset.json").read_text()) == found and (out / "losses.jsonl").read_text() == before


def test_a_measurement_belongs_to_its_gates_and_not_to_its_label(tiny, out):
    """A run that was stopped and comes to other weights does not find them measured, whatever the files call them."""
    settings = SubsetSettings(SubsetBudgetSettings(keep=5), TWO_POINTS)
    find_subset(tiny.adapter, str(tiny.validation), out, str(tiny.held_out), settings)
    shutil.rmtree(out / "adapter")
    for name in ("losses.jsonl", "confirm-losses.jsonl"):
        changed = [row | {"gates": "0" * 16, "nll_nats": 1e6} for row in rows(out / name)]
        (out / name).write_text("".join(json.dumps(row) + "\n" for row in changed))
    find_subset(tiny.adapter, str(tiny.validation), out, str(tiny.held_out), settings, resume=True)
    found = json.loads((out / "subset.json").read_text())
    assert found["chosen"]["value"] == pytest.approx(loss_of(out / "adapter", tiny.base, tiny.validation), rel=1e-5)
    loss = loss_of(out / "adapter", tiny.base, tiny.held_out)
    assert found["confirmation"]["value"] == pytest.approx(loss, rel=1e-5)
    assert {row["adapter"] for row in rows(out / "confirm-losses.jsonl")} == {"full", "pruned"}
