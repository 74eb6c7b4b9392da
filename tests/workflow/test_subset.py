"""Scores, subsets and refits from start to end, on a tiny model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lorazor.adapter.load import load
from lorazor.data.batches import make_batches
from lorazor.data.examples import read_examples
from lorazor.errors import BudgetError, MeasureError, OutputError, SettingsError
from lorazor.measure.losses import row_losses
from lorazor.selection import Selection
from lorazor.settings import (
    ModelSettings,
    RefitSettings,
    ScoreSettings,
    SearchSettings,
    SparseSettings,
    SubsetBudgetSettings,
)
from lorazor.workflow.prune import Choice, prune_adapter
from lorazor.workflow.score import score_adapter
from lorazor.workflow.subset import find_subset
from lorazor.workflow.variants import SubsetSettings
from tests.tiny_folders import make_folders, write_rows

TWO_POINTS = ScoreSettings(points=2)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def loss_of(adapter: Path, base: Path, data: Path) -> float:
    """With stock PEFT."""
    tokenizer = load(adapter).tokenizer
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    batches = make_batches(read_examples(str(data)), tokenizer, "causal", 8).batches
    losses = [row_losses(model.get_base_model(), batch) for batch in batches]
    return sum(float(one.nll_nats.sum()) for one in losses) / sum(float(one.n_tokens.sum()) for one in losses)


@pytest.fixture(scope="module")
def scored(tiny, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("scored") / "run"
    score_adapter(tiny.adapter, str(tiny.validation), out, TWO_POINTS)
    return out


def test_scores_are_written(tiny, scored):
    found = rows(scored / "scores.jsonl")
    assert len(found) == 28
    assert set(found[0]) == {
        "site", "stack", "layer", "kind", "n_parameters", "score", "standard_error", "score_per_parameter",
    }  # fmt: skip
    document = json.loads((scored / "score.json").read_text())
    assert document["n_passes"] == 2 and document["n_examples"] == 6
    sums = document["completeness"]
    assert sums["credit_sum"] == pytest.approx(sum(row["score"] for row in found))
    assert sums["loss_full"] == pytest.approx(loss_of(tiny.adapter, tiny.base, tiny.validation), rel=1e-5)
    run = json.loads((scored / "run.json").read_text())
    assert run["finished"] and len(run["base"]["fingerprint"]) == 64


@pytest.mark.parametrize("method", ["taylor", "output-norm", "norm", "random", "last-layers"])
def test_every_method_scores_every_site(tiny, out, method):
    data = str(tiny.validation) if method in ("taylor", "output-norm") else None
    result = score_adapter(tiny.adapter, data, out, ScoreSettings(method=method))
    assert len(result.scores) == 28 and result.completeness is None
    assert (result.scores[0].standard_error is not None) == (data is not None)


def test_scores_without_data_load_no_base_model(tiny, out):
    model = ModelSettings(model="no/such-model")
    assert score_adapter(tiny.adapter, None, out, ScoreSettings(method="norm"), model).n_passes == 0


def test_bad_scorings(tiny, out):
    with pytest.raises(SettingsError, match="method='credit' looks at examples"):
        score_adapter(tiny.adapter, None, out)
    with pytest.raises(SettingsError, match="points=0"):
        score_adapter(tiny.adapter, str(tiny.validation), out, ScoreSettings(points=0))
    with pytest.raises(SettingsError, match="method='shapley'"):
        score_adapter(tiny.adapter, None, out, ScoreSettings(method="shapley"))  # pyright: ignore[reportArgumentType]
    assert not out.exists()


def test_prune_by_scores(tiny, scored, out):
    budget = SubsetBudgetSettings(params_fraction=0.5)
    result, chosen = prune_adapter(tiny.adapter, out, Choice(scores=scored, budget=budget))
    assert 0.4 < result.n_parameters_kept / result.n_parameters <= 0.5
    worth = {row["site"]: row["score_per_parameter"] for row in rows(scored / "scores.jsonl")}
    largest = max(chosen.dropped, key=lambda site: worth[site.name])
    assert worth[largest.name] <= max(worth[site.name] for site in chosen.kept)
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny.base), out)


def test_scores_of_another_adapter_are_refused(tiny, scored, out, tmp_path):
    other = make_folders(tmp_path, r=2)
    with pytest.raises(MeasureError, match="of another adapter"):
        prune_adapter(other.adapter, out, Choice(scores=scored, budget=SubsetBudgetSettings(keep=3)))


def test_scores_with_another_base_are_refused(tiny, scored, out, tmp_path):
    changed = AutoModelForCausalLM.from_pretrained(tiny.base)
    with torch.no_grad():
        changed.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    changed.save_pretrained(tmp_path / "base")
    for path in tiny.base.glob("tok*"):
        shutil.copy(path, tmp_path / "base")
    choice = Choice(scores=scored, budget=SubsetBudgetSettings(keep=3))
    with pytest.raises(MeasureError, match="another base model"):
        refit = RefitSettings(refit=str(write_rows(tmp_path / "train.jsonl", range(20, 26))))
        prune_adapter(tiny.adapter, out, choice, refit, ModelSettings(model=str(tmp_path / "base")))


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (Choice(), "Pass one of"),
        (Choice(boundary=1, scores=Path("x")), "Pass one of"),
        (Choice(boundary=1, raw=True), "belong to --scores"),
        (Choice(boundary=1, budget=SubsetBudgetSettings(keep=1)), "belong to --scores"),
        (Choice(scores=Path("x"), stack="h"), "belong to --boundary"),
        (Choice(scores=Path("x"), budget=SubsetBudgetSettings(tolerance="loss")), "lorazor subset"),
    ],
)
def test_contradictory_choices(tiny, out, choice, message):
    with pytest.raises(SettingsError, match=message):
        prune_adapter(tiny.adapter, out, choice)


def test_an_unfinished_or_foreign_run_has_no_scores(tiny, scored, out, tmp_path):
    broken = tmp_path / "run"
    shutil.copytree(scored, broken)
    document = json.loads((broken / "run.json").read_text())
    (broken / "run.json").write_text(json.dumps(document | {"finished": False}))
    choice = Choice(scores=broken, budget=SubsetBudgetSettings(keep=1))
    with pytest.raises(OutputError, match="not a finished run"):
        prune_adapter(tiny.adapter, out, choice)
    (broken / "run.json").write_text(json.dumps(document))
    (broken / "scores.jsonl").write_text('{"site": "a"}\n')
    with pytest.raises(MeasureError, match="no score for every site"):
        prune_adapter(tiny.adapter, out, choice)


def test_refit_lowers_the_loss_and_is_folded(tiny, out, tmp_path):
    plain, fitted = tmp_path / "plain", tmp_path / "fitted"
    prune_adapter(tiny.adapter, plain, Choice(boundary=2))
    train = str(tiny.validation)
    _, chosen = prune_adapter(tiny.adapter, fitted, Choice(boundary=2), RefitSettings(refit=train, refit_steps=20))
    assert any(site.weight != 1 for site in chosen.kept) and all(site.weight == 1 for site in chosen.dropped)
    losses = [loss_of(path, tiny.base, tiny.validation) for path in (plain, fitted)]
    assert losses[1] < losses[0]
    assert "refitted in 20 steps" in (fitted / "README.md").read_text()


def subset(tiny, out: Path, budget: SubsetBudgetSettings, **settings) -> dict:
    everything = SubsetSettings(budget, settings.pop("scoring", TWO_POINTS), **settings)
    find_subset(tiny.adapter, str(tiny.validation), out, str(tiny.held_out), everything)
    return json.loads((out / "subset.json").read_text())


@pytest.mark.parametrize("by", ["site", "group", "kind", "layer", "window"])
def test_a_budget_of_parameters(tiny, out, by):
    found = subset(tiny, out, SubsetBudgetSettings(params_fraction=0.6), searching=SearchSettings(by=by))
    assert 0 < found["chosen"]["n_parameters"] <= 0.6 * found["n_parameters"]
    chosen = Selection.load(out / "selection.json")
    layers = {site.layer for site in chosen.kept}
    if by == "window":
        assert sorted(layers) == list(range(min(layers), max(layers) + 1))
    confirmation = found["confirmation"]
    assert confirmation["value"] == pytest.approx(loss_of(out / "adapter", tiny.base, tiny.held_out), rel=1e-5)
    assert confirmation["full_value"] == pytest.approx(loss_of(tiny.adapter, tiny.base, tiny.held_out), rel=1e-5)
    assert {row["adapter"] for row in rows(out / "confirm-losses.jsonl")} == {"full", "pruned"}


@pytest.mark.parametrize("settings", [{"rounds": 2}, {"verify": 2, "by": "layer"}, {"raw": True}])
def test_other_searches(tiny, out, settings):
    searching = SearchSettings(**settings)
    found = subset(tiny, out, SubsetBudgetSettings(keep_fraction=0.5), searching=searching)
    n_useful = sum(row["score"] > 0 for row in rows(out / "scores.jsonl"))
    if "rounds" in settings:
        assert 0 < found["chosen"]["n_sites"] <= n_useful
    else:
        assert found["chosen"]["n_sites"] == (14 if "verify" in settings else min(14, n_useful))


def test_verified_elimination_is_the_best_of_all_prefixes(tiny, out):
    """With all four layers tried at each step, the last step chose the best pair of the three that were left."""
    searching = SearchSettings(by="layer", verify=4)
    found = subset(tiny, out, SubsetBudgetSettings(keep=14), searching=searching)
    pairs = [one["value"] for one in found["candidates"] if one["n_sites"] == 14]
    assert found["chosen"]["value"] == pytest.approx(min(pairs))


@pytest.mark.parametrize("rule", ["one-se", "no-worse"])
def test_a_tolerance(tiny, out, rule):
    """The chosen subset passes the test, and every smaller one that was measured does not."""
    found = subset(tiny, out, SubsetBudgetSettings(tolerance="loss"), searching=SearchSettings(rule=rule))

    def passes(difference: dict) -> bool:
        if rule == "no-worse":
            return difference["low"] <= 0
        return difference["estimate"] <= difference["standard_error"]

    smaller = [one for one in found["candidates"] if one["n_parameters"] < found["chosen"]["n_parameters"]]
    assert passes(found["chosen"]["difference"])
    assert not any(passes(one["difference"]) for one in smaller)


def test_a_tolerance_that_nothing_meets(tiny, out, monkeypatch):
    monkeypatch.setattr("lorazor.workflow.search.is_tolerable", lambda *_: False)
    found = subset(tiny, out, SubsetBudgetSettings(tolerance="loss"))
    assert found["chosen"]["n_sites"] == 28
    assert "No smaller selection was found" in found["reason"]


def test_a_text_metric_with_baselines_and_refit(tiny, out):
    found = subset(
        tiny,
        out,
        SubsetBudgetSettings(tolerance="rougeL"),
        searching=SearchSettings(baselines=True, by="layer"),
        refitting=RefitSettings(refit=str(write_rows(out.parent / "train.jsonl", range(20, 26))), refit_steps=2),
    )
    assert [one["label"] for one in found["baselines"]] == ["random", "first-layers", "last-layers", "norm"]
    assert {row["adapter"] for row in rows(out / "confirm-predictions.jsonl")} == {"full", "pruned"}
    assert "rougeL" in rows(out / "predictions.jsonl")[0]
    if found["chosen"]["n_sites"] < 28:
        assert rows(out / "refit.jsonl")


@pytest.mark.parametrize("ranks", ["mixed", "uniform"])
def test_ranks_within_a_budget(tiny, out, ranks):
    refit = RefitSettings(refit=str(write_rows(out.parent / "train.jsonl", range(20, 26))), refit_steps=2)
    budget = SubsetBudgetSettings(params_fraction=0.3)
    found = subset(tiny, out, budget, searching=SearchSettings(ranks=ranks), refitting=refit)
    assert found["chosen"]["n_parameters"] <= 0.3 * found["n_parameters"]
    kept_ranks = {site.kept_rank for site in Selection.load(out / "selection.json").kept}
    assert len(kept_ranks) == 1 or ranks == "mixed"
    loss = loss_of(out / "adapter", tiny.base, tiny.held_out)  # what was measured is what stock PEFT computes
    assert found["confirmation"]["value"] == pytest.approx(loss, rel=1e-4)


def test_sparse_gates_choose_and_fit(tiny, out):
    train = str(write_rows(out.parent / "train.jsonl", range(20, 26)))
    found = subset(
        tiny, out, SubsetBudgetSettings(keep=5), refitting=RefitSettings(train, 3), sparse=SparseSettings(True)
    )
    assert found["chosen"]["n_sites"] == 5
    assert any(site.weight != 1 for site in Selection.load(out / "selection.json").kept)


def test_resume_measures_nothing_twice(tiny, out, monkeypatch):
    arguments = (tiny.adapter, str(tiny.validation), out, str(tiny.held_out))
    settings = SubsetSettings(SubsetBudgetSettings(keep=5), TWO_POINTS)
    find_subset(*arguments, settings)
    before = (out / "losses.jsonl").read_text(), (out / "selection.json").read_bytes()
    shutil.rmtree(out / "adapter")

    def refuse(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr("lorazor.workflow.losses.row_losses", refuse)
    find_subset(*arguments, settings, resume=True)
    assert ((out / "losses.jsonl").read_text(), (out / "selection.json").read_bytes()) == before
    assert (out / "adapter").exists()


@pytest.mark.parametrize(
    ("budget", "settings", "message"),
    [
        ({}, {}, "None given as the budget"),
        ({"keep": 3, "params": 9}, {}, "keep=3 and params=9"),
        ({"keep": 0}, {}, "keep=0, but the adapter has 28 sites"),
        ({"params_fraction": 1.5}, {}, "params_fraction=1.5"),
        ({"params": 5}, {}, "A budget of 5 keeps nothing"),
        ({"tolerance": "blue"}, {}, "metric='blue' is unknown"),
        ({"tolerance": "loss"}, {"searching": SearchSettings(metric="bleu")}, "contradicts"),
        ({"tolerance": "accuracy"}, {}, "needs labels"),
        ({"keep": 3}, {"searching": SearchSettings(ranks="mixed")}, "needs a budget of parameters"),
        ({"params": 900}, {"searching": SearchSettings(ranks="mixed", by="kind")}, "single sites"),
        ({"tolerance": "loss"}, {"searching": SearchSettings(ranks="uniform")}, "in one round"),
        ({"keep": 3}, {"searching": SearchSettings(rounds=0)}, "rounds=0"),
        ({"tolerance": "loss"}, {"searching": SearchSettings(rule="best")}, "rule='best' is unknown"),
        ({"keep": 3}, {"searching": SearchSettings(by="window", verify=2)}, "Leave out --verify"),
        ({"keep": 3}, {"sparse": SparseSettings(True)}, "pass --refit TRAIN"),
    ],
)
def test_bad_settings(tiny, out, budget, settings, message):
    with pytest.raises((SettingsError, BudgetError), match=message):
        subset(tiny, out, SubsetBudgetSettings(**budget), scoring=ScoreSettings("norm"), **settings)
