"""`lorazor train --method weightlora --by direction`: what is chosen and goes on, also after an interruption."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from lorazor.adapter.sites import find_sites
from lorazor.cli.select import texts
from lorazor.errors import BudgetError, SettingsError
from lorazor.selection import Selection
from lorazor.settings import BudgetSettings, ChoosingSettings, FitSettings, TrainSettings
from lorazor.train.choose import steps_of_selection
from lorazor.train.resume import MarkComplete
from lorazor.train.start import Start
from lorazor.train.warmup import Warmup
from lorazor.workflow import training
from lorazor.workflow.train import select_sites, train_adapter, with_defaults
from tests.workflow.broken_off import Killed, at_step, check_ends_like, kill_in
from tests.workflow.test_train import N_SITES, SELECT_STEPS, STEPS, choosing_of, settings_of

RANK, BUDGET = 4, 3000


def by_direction(tiny, **changes) -> TrainSettings:
    choosing = ChoosingSettings("direction", SELECT_STEPS)
    return settings_of(
        tiny,
        keep=None,
        **{"budget__params": BUDGET, "choosing": choosing, "lora__rank": RANK, "lora__alpha": 8, **changes},
    )


def logits(folder, tiny):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny.base), folder).eval()
    with torch.no_grad():
        return model, model(input_ids=torch.arange(5, 40)[None]).logits


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """A run that nothing interrupted; and beside it what the selection run had left."""
    root, out = tmp_path_factory.mktemp("whole"), None
    out = root / "run"
    finish = training.Training.finish

    def spy(self):
        shutil.copytree(out / "select", root / "select")
        finish(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.Training, "finish", spy)
        train_adapter(str(tiny.validation), out=out, settings=by_direction(tiny))
    return out


def test_the_best_directions_per_parameter_stay_until_the_budget_is_used_up(tiny, whole):
    lines = [json.loads(line) for line in (whole / "scores.jsonl").read_text().splitlines()]
    every = [
        (score * RANK / line["n_parameters"], line["n_parameters"] // RANK, line["site"], place)
        for line in lines
        for place, score in enumerate(line["fisher"])
    ]
    assert len(every) == RANK * N_SITES
    left, expected = BUDGET, set()
    for worth, size, name, place in sorted(every, key=lambda one: -one[0]):
        if size <= left and worth > 0:
            left, expected = left - size, expected | {(name, place)}
    selection = Selection.load(whole / "selection.json")
    assert {(one.name, j) for one in selection.kept for j in one.components or range(RANK)} == expected
    assert {(line["site"], j) for line in lines for j in range(RANK) if line["kept"][j]} == expected
    model, _ = logits(whole, tiny)
    ranks = {site.name: site.rank for site in find_sites(model)}
    assert ranks == {one.name: one.kept_rank for one in selection.kept}
    assert sum(p.numel() for n, p in model.named_parameters() if "lora_" in n) == BUDGET - left
    config = json.loads((whole / "adapter_config.json").read_text())
    assert (
        len({*ranks.values()}) > 1 and config["alpha_pattern"] == {} and config["lora_alpha"] == 8 / RANK * config["r"]
    )
    assert not (whole / "gates.jsonl").exists()
    (note,) = json.loads((whole / "run.json").read_text())["notes"]
    assert note.startswith(f"Kept {len(expected)} of {RANK * N_SITES} directions on {len(ranks)} of {N_SITES} sites")


def test_what_stays_computes_what_its_directions_computed(tiny, whole):
    """Zeros in the place of the directions that go, in the adapter on all sites, in stock PEFT."""
    folder, selection = whole.parent / "select", Selection.load(whole / "selection.json")
    model, _ = logits(folder / "adapter", tiny)
    kept = {one.name: list(one.components or range(RANK)) for one in selection.kept}
    for site in find_sites(model):
        gone = [j for j in range(RANK) if j not in kept.get(site.name, [])]
        with torch.no_grad():
            site.module.lora_B["default"].weight[:, gone] = 0
    with torch.no_grad():
        expected = model(input_ids=torch.arange(5, 40)[None]).logits
    torch.testing.assert_close(logits(folder / "kept", tiny)[1], expected, atol=1e-5, rtol=0)


def test_a_budget_for_everything_changes_nothing_and_training_starts_with_equal_norms(tiny, tmp_path, monkeypatch):
    starts = {}

    def spy(self, folder, selection):
        loaded, model = from_adapter(self, folder, selection)
        shutil.copytree(folder.parent / "adapter", tmp_path / "all")
        shutil.copytree(folder, tmp_path / "kept")
        starts.update({site.name: site.module for site in find_sites(model)})
        raise Killed

    from_adapter = Start.from_adapter
    monkeypatch.setattr(Start, "from_adapter", spy)
    settings = by_direction(tiny, budget=BudgetSettings(keep_fraction=1.0))
    with pytest.raises(Killed):
        train_adapter(str(tiny.validation), out=tmp_path / "run", settings=settings)
    torch.testing.assert_close(logits(tmp_path / "kept", tiny)[1], logits(tmp_path / "all", tiny)[1], atol=1e-4, rtol=0)
    for module in starts.values():
        A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
        torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0), rtol=1e-4, atol=1e-6)
        assert module.scaling["default"] == 8 / RANK  # that of the warm-up, whatever is left of the rank


@pytest.mark.parametrize(
    ("changes", "by"),
    [
        ({}, "direction"),
        ({"choosing__score": "balanced"}, "direction"),
        ({"budget": BudgetSettings(params_fraction=0.1)}, "direction"),
        ({"choosing__by": "site"}, "site"),
        ({"choosing__score": "gate"}, "site"),
        ({"choosing__schedule": "progressive"}, "site"),
        ({"start": "fresh"}, "site"),
        ({"method": "weightlora+"}, "site"),
        ({"budget": BudgetSettings(keep=5)}, "site"),
        ({"budget": BudgetSettings(step_time=0.5)}, "site"),
    ],
)
def test_parameters_are_spent_on_directions_where_nothing_asks_for_sites(tiny, changes, by):
    settings = by_direction(tiny, **{"choosing": ChoosingSettings(), **changes})
    assert with_defaults(settings).choosing.by == by


@pytest.mark.parametrize(
    ("changes", "score", "steps"),
    [
        ({"budget": BudgetSettings(step_time=0.5)}, "last-layers", 0),
        ({"budget": BudgetSettings(memory="12GB")}, "random", 0),
        ({"budget": BudgetSettings(memory="12GB"), "choosing__select_steps": 50}, "gate", 50),
        ({"budget": BudgetSettings(memory="12GB"), "choosing__score": "loss-change"}, "loss-change", 100),
        ({"budget": BudgetSettings(keep=5)}, "gate", 100),
        ({"budget": BudgetSettings(params=500)}, "fisher", 240),
    ],
)
def test_a_limit_on_a_step_needs_no_evidence_where_nothing_else_is_asked_for(tiny, changes, score, steps):
    settings = by_direction(tiny, **{"choosing": ChoosingSettings(), **changes})
    choosing = with_defaults(settings).choosing
    assert choosing.score == score and steps_of_selection(choosing, FitSettings(steps=300)) == steps


@pytest.mark.parametrize(("by", "steps"), [("direction", 240), ("site", 100), (None, 100)])
def test_directions_are_chosen_late_and_sites_early(by, steps):
    assert steps_of_selection(ChoosingSettings(by), FitSettings(steps=300)) == steps


@pytest.mark.slow
def test_a_share_of_the_parameters_is_one_of_stock_lora(tiny, tmp_path):
    settings = by_direction(tiny, budget=BudgetSettings(params_fraction=0.3), choosing=ChoosingSettings())
    result = train_adapter(str(tiny.validation), out=tmp_path / "run", settings=settings)
    base = AutoModelForCausalLM.from_pretrained(tiny.base)
    stock = get_peft_model(base, LoraConfig(r=RANK, target_modules="all-linear")).get_nb_trainable_parameters()[0]
    assert 0.25 * stock < result.n_parameters <= 0.3 * stock


@pytest.mark.slow
def test_the_selection_run_alone_gives_ranks_for_another_training(tiny, tmp_path):
    settings = dataclasses.replace(choosing_of(tiny, keep=40), choosing=ChoosingSettings("direction", SELECT_STEPS))
    selection = select_sites(str(tiny.validation), out=tmp_path / "choice", settings=settings).selection
    ranks = {one.name: one.kept_rank for one in selection.kept}
    assert 0 < sum(ranks.values()) <= 40 and {*ranks.values()} == {1, 2}
    scope: dict = {}
    exec(texts(selection, "peft", settings.lora)[0], scope)
    config = scope["peft_config"]
    again = settings_of(
        tiny, method="lora", keep=None, choosing=ChoosingSettings(), selection=tmp_path / "choice" / "selection.json"
    )
    train_adapter(str(tiny.validation), out=tmp_path / "run", settings=again)
    model, _ = logits(tmp_path / "run", tiny)
    assert {site.name: site.rank for site in find_sites(model)} == ranks
    written = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"]) == (config.r, config.lora_alpha) == (2, 4)
    assert written["rank_pattern"] == config.rank_pattern


@pytest.mark.parametrize(
    "moment",
    [
        "in the warm-up",
        pytest.param("before the choice is kept", marks=pytest.mark.slow),
        pytest.param("after", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_goes_on_and_ends_like_one_without_a_break(tiny, whole, tmp_path, monkeypatch, moment):
    out, settings = tmp_path / "run", by_direction(tiny)
    where = {
        "in the warm-up": (Warmup, "on_optimizer_step", at_step("select", 2)),
        "before the choice is kept": (training, "write_pruned"),
        "after": (MarkComplete, "on_save", at_step("train", 3)),
    }
    kill_in(monkeypatch, *where[moment])
    with pytest.raises(Killed):
        train_adapter(str(tiny.validation), out=out, settings=settings)
    result = train_adapter(str(tiny.validation), out=out, settings=settings, resume=True)
    check_ends_like(whole, result, STEPS)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"method": "weightlora+"}, SettingsError, r"WeightLoRA\+ makes it higher"),
        ({"start": "fresh"}, SettingsError, r"lorazor select --by direction"),
        ({"method": "lora", "budget__params": None}, SettingsError, r"Pass --method weightlora as well"),
        ({"budget__params": 20}, BudgetError, r"holds no direction: the smallest has 48"),
        ({"budget__params": None, "budget__keep": 0}, BudgetError, r"keep=0 directions\."),
        ({"budget__params": None, "budget__keep": 113}, BudgetError, r"keep=113 directions, but the model has 112"),
        ({"choosing__score": "gate"}, SettingsError, r"score='gate' does not rank by direction"),
        ({"choosing__schedule": "progressive"}, SettingsError, r"are cut once"),
    ],
)
def test_what_directions_cannot_do_is_refused_before_anything_is_written(tiny, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        train_adapter(str(tiny.validation), out=tmp_path / "run", settings=by_direction(tiny, **changes))
    assert not (tmp_path / "run").exists()
