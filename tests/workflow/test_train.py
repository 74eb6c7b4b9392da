"""Training from start to end: which sites, which weights, which learning rates; interrupted and gone on with."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, TrainingArguments, get_linear_schedule_with_warmup

from lorazor.adapter.sites import find_sites
from lorazor.data.examples import Example
from lorazor.errors import BudgetError, DataError, MeasureError, OutputError, SelectionError, SettingsError
from lorazor.selection import Selection
from lorazor.settings import (
    BudgetSettings,
    ChoosingSettings,
    FitSettings,
    LoraSettings,
    ModelSettings,
    SelectSettings,
    TrainSettings,
)
from lorazor.train import fit
from lorazor.train.start import Start
from lorazor.workflow import training
from lorazor.workflow.train import select_sites, train_adapter
from tests.workflow.broken_off import Killed, at_step, check_ends_like, kill_in, weights_of

STEPS, SELECT_STEPS, N_SITES = 9, 4, 28


def settings_of(tiny, *, keep=5, **changes):
    parts = TrainSettings(
        method="weightlora",
        model=ModelSettings(str(tiny.base)),
        batch_size=2,
        lora=LoraSettings(rank=2, alpha=4),
        fit=FitSettings(steps=STEPS, learning_rate=0.02, rise_steps=2, save_steps=1),
        budget=BudgetSettings(keep=keep),
        choosing=ChoosingSettings(select_steps=SELECT_STEPS, dense_steps=1, gate_lr=50.0, growth="paper"),
    )
    for name, value in changes.items():
        part, _, field = name.partition("__")
        new = dataclasses.replace(getattr(parts, part), **{field: value}) if field else value
        parts = dataclasses.replace(parts, **{part: new})
    return parts


def choosing_of(tiny, **budget):
    """The selection run of `settings_of`."""
    both = settings_of(tiny)
    return SelectSettings(
        batch_size=2,
        budget=BudgetSettings(**budget),
        choosing=both.choosing,
        lora=both.lora,
        fit=both.fit,
        model=both.model,
    )


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """A two-phase run with growth that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train_adapter(str(tiny.validation), out=out, settings=settings_of(tiny, method="weightlora+"))
    return out


@pytest.mark.slow
def test_what_comes_out_is_an_ordinary_adapter_of_the_chosen_sites(tiny, whole):
    selection = Selection.load(whole / "selection.json")
    assert (selection.method, len(selection.sites), len(selection.kept)) == ("weightlora+", N_SITES, 5)
    assert {site.rank for site in selection.kept} == {2 * N_SITES // 5} == {11}
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny.base), whole)
    sites = find_sites(model)
    assert {site.name for site in sites} == {site.name for site in selection.kept}
    assert {site.rank for site in sites} == {11} and {site.scaling for site in sites} == {2.0}
    config = json.loads((whole / "adapter_config.json").read_text())
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})
    assert {path.name for path in whole.iterdir() if path.is_dir()} == set()  # no checkpoints are left
    rows = [json.loads(line) for line in (whole / "scores.jsonl").read_text().splitlines()]
    assert len(rows) == N_SITES and {"gate", "gate-norm", "probe", "loss-change", "random"} <= rows[0].keys()
    steps = [json.loads(line) for line in (whole / "gates.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps] == [*range(1, SELECT_STEPS + 1)]
    assert [abs(gate) for gate in steps[-1]["gates"]] == [row["gate"] for row in rows]
    best = sorted(rows, key=lambda row: -row["gate"])[:5]
    assert {row["site"] for row in best} == {site.name for site in selection.kept}


@pytest.mark.slow
def test_one_learning_rate_and_one_count_of_epochs_over_both_runs(tiny, whole):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.02)
    schedule = get_linear_schedule_with_warmup(optimizer, 2, STEPS)
    expected = []
    for _ in range(STEPS):
        expected.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    log = [json.loads(line) for line in (whole / "training.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == list(range(1, STEPS + 1))
    assert [entry["learning_rate"] for entry in log] == pytest.approx(expected)
    n_rows = len(tiny.validation.read_text().splitlines())
    assert [entry["epoch"] for entry in log] == pytest.approx([2 * step / n_rows for step in range(1, STEPS + 1)])


@pytest.mark.slow
def test_a_warm_start_goes_on_and_a_fresh_one_starts_anew(tiny, tmp_path, monkeypatch):
    """At the start of the second run, in stock PEFT's terms: B as the first run left it, or zero."""
    starts = {}

    def watch(fit):
        def spy(model, loaded, rows, folder, *args):
            if folder.name == "train":
                key = folder.parent.name
                starts[key] = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}
                if key == "warm":
                    shutil.copytree(folder.parent / "select" / "adapter", tmp_path / "after-selection")
            return fit(model, loaded, rows, folder, *args)

        return spy

    monkeypatch.setattr(training, "fit", watch(training.fit))
    for start in ("warm", "fresh"):
        train_adapter(str(tiny.validation), out=tmp_path / start, settings=settings_of(tiny, start=start))
    selections = [(tmp_path / start / "selection.json").read_text() for start in ("warm", "fresh")]
    assert json.loads(selections[0])["sites"] == json.loads(selections[1])["sites"]
    learned = weights_of(tmp_path / "after-selection")
    assert len(starts["warm"]) == len(starts["fresh"]) == 10
    assert len(learned) == 2 * N_SITES and all(tensor.any() for tensor in learned.values())  # dropped ones as well
    for name, tensor in starts["warm"].items():
        torch.testing.assert_close(tensor, learned[name.replace(".default", "")], atol=0, rtol=0)
        assert tensor.any()
    assert all(tensor.any() == ("lora_A" in name) for name, tensor in starts["fresh"].items())


@pytest.mark.slow
def test_the_selection_run_alone_and_its_sites_in_another_training(tiny, tmp_path, capsys):
    data = str(tiny.validation)
    selection = select_sites(data, out=tmp_path / "choice", settings=choosing_of(tiny, keep=5)).selection
    bar = capsys.readouterr().err  # counts the steps of this run, not those of the training that it begins
    assert "choosing sites" in bar and " 100% " in bar
    assert Selection.load(tmp_path / "choice" / "selection.json") == selection
    assert not (tmp_path / "choice" / "adapter_model.safetensors").exists()
    train_adapter(data, out=tmp_path / "both", settings=settings_of(tiny, start="fresh"))
    assert Selection.load(tmp_path / "both" / "selection.json").sites == selection.sites
    settings = settings_of(
        tiny, method="lora", keep=None, choosing=ChoosingSettings(), selection=tmp_path / "choice" / "selection.json"
    )
    result = train_adapter(data, out=tmp_path / "run", settings=settings)
    assert result.n_sites == 5
    stems = {key.split(".lora_")[0].removeprefix("base_model.model.") for key in weights_of(tmp_path / "run")}
    assert stems == {site.name for site in selection.kept}


@pytest.mark.slow
@pytest.mark.parametrize("budget", [{"keep_fraction": 0.1}, {"params": 700}])
def test_other_budgets(tiny, tmp_path, budget):
    settings = choosing_of(tiny, **budget)
    selection = select_sites(str(tiny.validation), out=tmp_path / "run", settings=settings).selection
    if "params" in budget:
        rows = [json.loads(line) for line in (tmp_path / "run" / "scores.jsonl").read_text().splitlines()]
        sizes = {row["site"]: row["n_parameters"] for row in rows}
        total = sum(sizes[site.name] for site in selection.kept)
        assert 0 < total <= 700
        assert all(total + sizes[site.name] > 700 for site in selection.dropped)
    else:
        assert len(selection.kept) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment",
    [
        "in the warm-up",
        pytest.param("while a checkpoint is written", marks=pytest.mark.slow),
        "before the choice is kept",
        pytest.param("at the switch", marks=pytest.mark.slow),
        pytest.param("after", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_goes_on_and_ends_like_one_without_a_break(tiny, whole, tmp_path, monkeypatch, moment):
    from lorazor.train.resume import MarkComplete
    from lorazor.train.warmup import Warmup

    out, settings = tmp_path / "run", settings_of(tiny, method="weightlora+")
    where = {
        "in the warm-up": (Warmup, "on_optimizer_step", at_step("select", 2)),
        "while a checkpoint is written": (MarkComplete, "on_save", at_step("select", 3)),
        "before the choice is kept": (training, "write_pruned"),
        "at the switch": (Start, "from_adapter"),
        "after": (MarkComplete, "on_save", at_step("train", 3)),
    }
    kill_in(monkeypatch, *where[moment])
    with pytest.raises(Killed):
        train_adapter(str(tiny.validation), out=out, settings=settings)
    assert not (out / "adapter_config.json").exists()
    with pytest.raises(OutputError, match="is not empty"):
        train_adapter(str(tiny.validation), out=out, settings=settings)
    result = train_adapter(str(tiny.validation), out=out, settings=settings, resume=True)
    check_ends_like(whole, result, STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["optimizer.pt", "adapter_model.safetensors", "lorazor_complete"])
def test_a_checkpoint_that_lost_the_end_of_a_file_is_passed_over(tiny, whole, tmp_path, monkeypatch, name):
    """As after a failure of the power: what was written last is there, and shorter."""
    out, settings = tmp_path / "run", settings_of(tiny, method="weightlora+")
    kill_in(monkeypatch, fit.CountSteps, "on_step_begin", at_step("train", 3))
    with pytest.raises(Killed):
        train_adapter(str(tiny.validation), out=out, settings=settings)
    file = out / "train" / "checkpoint-3" / name
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.warns(UserWarning, match=rf"checkpoint-3' is passed over: '{name}' is not as it was written"):
        result = train_adapter(str(tiny.validation), out=out, settings=settings, resume=True)
    check_ends_like(whole, result, STEPS)


@pytest.mark.slow
def test_a_finished_run_is_not_trained_again_and_other_settings_are_refused(tiny, whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    messages = []
    settings = settings_of(tiny, method="weightlora+")
    result = train_adapter(str(tiny.validation), out=out, settings=settings, resume=True, say=messages.append)
    assert result.n_sites == 5 and "has finished" in messages[0]
    with pytest.raises(OutputError, match="holds another run: keep was 5 and is now 4"):
        train_adapter(
            str(tiny.validation), out=out, settings=settings_of(tiny, method="weightlora+", keep=4), resume=True
        )
    with pytest.raises(OutputError, match="holds another run: data was"):
        train_adapter(str(tiny.held_out), out=out, settings=settings, resume=True)
    with pytest.raises(OutputError, match="is now '1 examples in memory, [0-9a-f]{12}'"):
        train_adapter([Example(0, "one", "two", ("two",))], out=out, settings=settings, resume=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"keep": None}, BudgetError, r"None given as the budget\. Pass one of --params N"),
        ({"budget__params": 100}, BudgetError, r"keep=5 and params=100 given"),
        ({"keep": 0}, BudgetError, r"keep=0 sites\. Pass a whole number, 1 or more"),
        ({"keep": None, "budget__keep_fraction": 1.5}, BudgetError, r"keep_fraction=1\.5"),
        ({"keep": 29}, BudgetError, r"keep=29 sites, but the model has 28 LoRA sites"),
        ({"keep": None, "budget__params_fraction": 0.0}, BudgetError, r"params_fraction=0\.0 of the parameters"),
        ({"keep": None, "budget__params": 10}, BudgetError, r"10 parameters holds no direction: the smallest has"),
        (
            {"keep": None, "budget__params": 10, "choosing__score": "gate"},
            BudgetError,
            r"10 parameters holds no site: the smallest has",
        ),
        ({"choosing__select_steps": 9}, SettingsError, r"select_steps=9 of steps=9"),
        ({"choosing__select_steps": 1}, SettingsError, r"select_steps=1 end while the learning rate rises"),
        ({"choosing__score": "luck"}, SettingsError, r"score='luck' is unknown\. Pass one of gate, "),
        (
            {"choosing__score": "loss-change", "choosing__schedule": "every-step"},
            SettingsError,
            r"Pass schedule='one-cut'",
        ),
        ({"method": "lora"}, SettingsError, r"method='lora' trains every site"),
        ({"fit__steps": 0}, SettingsError, r"steps=0 must be above 0"),
        ({"keep": None, "budget__params_fraction": 1e-9}, BudgetError, r"params_fraction=1e-09 of .* is none"),
        ({"fit__steps": 1, "fit__rise_steps": 0}, SettingsError, r"select_steps=4 of steps=1.*Pass more steps"),
        ({"lora__rank": 0}, SettingsError, r"rank=0 must be above 0"),
        ({"lora__target_modules": "nowhere"}, SettingsError, r"target_modules='nowhere'"),
        ({"model__task": "classification"}, DataError, r"task='classification', but the data is not of that kind"),
        ({"model__model": None}, SettingsError, r"No base model"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(tiny, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        train_adapter(str(tiny.validation), out=tmp_path / "run", settings=settings_of(tiny, **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("by", ["site", "direction", None])
def test_a_training_that_diverges_is_an_error_and_no_adapter(tiny, tmp_path, by):
    """The Trainer would log a loss that is no number as 0."""
    changes = {"choosing__by": by} if by else {"method": "lora", "keep": None, "choosing": ChoosingSettings()}
    settings = settings_of(tiny, fit__learning_rate=1e30, fit__rise_steps=0, **changes)
    with pytest.raises(MeasureError, match=r"not a number|is (nan|inf)|became nan"):
        train_adapter(str(tiny.validation), out=tmp_path / "run", settings=settings)
    assert not (tmp_path / "run" / "adapter_config.json").exists()


def test_a_rate_that_never_reaches_its_peak_is_noted(tiny, tmp_path):
    settings = settings_of(tiny, method="lora", keep=None, choosing=ChoosingSettings(), fit__steps=2, fit__rise_steps=4)
    train_adapter(str(tiny.validation), out=tmp_path / "run", settings=settings)
    (note,) = json.loads((tmp_path / "run" / "run.json").read_text())["notes"]
    assert note.startswith("The learning rate rises over 4 steps, and the training has 2: it ends before the peak.")


def test_data_that_does_not_fit_leaves_no_run_behind(tiny, tmp_path):
    with pytest.raises(DataError, match="max_length=2 has room for 1"):
        train_adapter(str(tiny.validation), out=tmp_path / "run", settings=settings_of(tiny, reading__max_length=2))
    assert not (tmp_path / "run").exists()


def test_texts_of_a_single_class_are_refused(tiny, tmp_path):
    (tmp_path / "data.jsonl").write_text('{"text": "a", "label": 1}\n' * 3)
    with pytest.raises(DataError, match=r"Every text has the label 1, so there is nothing to learn"):
        train_adapter(str(tmp_path / "data.jsonl"), out=tmp_path / "run", settings=settings_of(tiny))


def test_several_gpus_in_one_process_do_not_multiply_the_batch(tmp_path, monkeypatch):
    """The Trainer would put a batch on every GPU that it sees."""
    devices = vars(TrainingArguments)["_setup_devices"].func

    def two_gpus(self):
        device, self._n_gpu = devices(self), 2
        return device

    monkeypatch.setattr(TrainingArguments, "_setup_devices", property(two_gpus))
    assert fit.training_arguments(tmp_path, FitSettings(), 8, range(300), []).train_batch_size == 8


@pytest.mark.slow
def test_selections_that_cannot_be_trained(tiny, whole, tmp_path):
    document = json.loads((whole / "selection.json").read_text())

    def refuse(message, change):
        changed = json.loads(json.dumps(document))
        change(changed["sites"])
        (tmp_path / "selection.json").write_text(json.dumps(changed))
        settings = settings_of(
            tiny, method="lora", keep=None, choosing=ChoosingSettings(), selection=tmp_path / "selection.json"
        )
        with pytest.raises(SelectionError, match=message):
            train_adapter(str(tiny.validation), out=tmp_path / "run", settings=settings)
        assert not (tmp_path / "run").exists()

    kept = [place for place, site in enumerate(document["sites"]) if site["keep"]]
    refuse(r"keeps no site", lambda sites: [site.update(keep=False) for site in sites])
    refuse(r"such as 'model\.layers\.9", lambda sites: sites[kept[0]].update(name="model.layers.9.mlp.up_proj"))
    settings = settings_of(tiny, keep=None, selection=tmp_path / "selection.json")
    with pytest.raises(SettingsError, match="a selection was given as well"):
        train_adapter(str(tiny.validation), out=tmp_path / "run", settings=settings)
