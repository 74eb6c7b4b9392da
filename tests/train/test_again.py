"""One callback in several trainings: of fresh models it is as new; of the same model it is refused."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer

from lorazor.errors import OutputError, SettingsError
from lorazor.selection import Selection
from lorazor.train.callback import WeightLora
from tests.train.tiny_training import Collator, arguments, make_trainer, rows, tiny_llama

STEPS, WARMUP = 5, 3


def callback_of():
    return WeightLora(4, WARMUP, dense_steps=1)


def fresh():
    torch.manual_seed(0)
    return tiny_llama()


def trainer_of(folder, callback, **kwargs):
    return Trainer(
        model_init=fresh,
        args=arguments(folder, STEPS, save_strategy="steps", save_steps=2, **kwargs),
        train_dataset=rows(),
        eval_dataset=rows(6, seed=1),
        data_collator=Collator(),
        callbacks=[callback],
    )


def test_a_second_training_of_a_fresh_model_is_like_the_first(tmp_path):
    callback = callback_of()
    trainer = trainer_of(tmp_path / "first", callback)
    trainer.train()
    first, log = callback.selection, (tmp_path / "first" / "gates.jsonl").read_text()
    with pytest.raises(OutputError, match=r"is the outcome of another training"):
        trainer.train()
    trainer.args.output_dir = str(tmp_path / "second")
    trainer.train()
    assert callback.selection.to_json() == first.to_json() and callback.selection is not first
    assert (tmp_path / "second" / "gates.jsonl").read_text() == log


@pytest.mark.slow
def test_a_training_that_broke_off_does_not_shut_out_the_next(tmp_path):
    callback = callback_of()
    trainer = trainer_of(tmp_path / "first", callback)

    def break_off(*args, **kwargs):
        raise KeyboardInterrupt

    callback.on_log = break_off
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    del callback.on_log
    trainer.args.output_dir = str(tmp_path / "second")
    trainer.train()
    assert len(callback.selection.kept) == 4


def test_the_same_model_is_not_cut_twice(tmp_path):
    callback = callback_of()
    trainer = make_trainer(tmp_path, fresh(), callback, steps=STEPS)
    trainer.train()
    with pytest.raises(SettingsError, match=r"sites of this model already: 4 of 14\. To train on.*model_init"):
        trainer.train()
    trainer.remove_callback(WeightLora)
    trainer.train()


@pytest.mark.slow
def test_a_finished_training_can_be_made_longer(tmp_path):
    callback = callback_of()
    trainer = make_trainer(tmp_path, fresh(), callback, steps=STEPS, save_strategy="steps", save_steps=STEPS)
    trainer.train()
    chosen = callback.selection.to_json()
    trainer.args.max_steps = STEPS + 2
    trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS}"))
    assert trainer.state.global_step == STEPS + 2 and callback.selection.to_json() == chosen


def searching(monkeypatch, trainer, rates):
    """hyperparameter_search without one of its packages: trials in turn, as its own loop over them makes them."""
    trials = []

    def run(trainer, n_trials, direction, **kwargs):
        for number, rate in enumerate(rates):
            trials.append(SimpleNamespace(number=number, params={"learning_rate": rate}))
            trainer.objective = None
            trainer.train(trial=trials[-1])
            trainer.objective = trainer.evaluate()["eval_loss"]
        return trials

    optuna = SimpleNamespace(ensure_available=lambda: None, run=run, default_hp_space=None)
    monkeypatch.setattr("transformers.trainer.ALL_HYPERPARAMETER_SEARCH_BACKENDS", {"optuna": lambda: optuna})
    monkeypatch.setattr(Trainer, "_report_to_hp_search", lambda *_: None)
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)
    trainer.hyperparameter_search(lambda trial: trial.params, backend="optuna", n_trials=len(rates))


def test_every_trial_of_a_hyperparameter_search_chooses_its_own_sites(tmp_path, monkeypatch):
    alone = []
    for place, rate in enumerate((5e-3, 0.3)):
        callback = callback_of()
        trainer_of(tmp_path / f"alone-{place}", callback, learning_rate=rate).train()
        alone.append(callback.selection)
    callback = callback_of()
    searching(monkeypatch, trainer_of(tmp_path / "search", callback), [5e-3, 0.3])
    for place, selection in enumerate(alone):
        folder = tmp_path / "search" / f"run-{place}"
        assert Selection.load(folder / "selection.json").to_json() == selection.to_json()
        assert Selection.load(folder / "checkpoint-4" / "selection.json").to_json() == selection.to_json()
        assert (folder / "checkpoint-2" / "lorazor_warmup.pt").is_file()
        assert len(json.loads((folder / "checkpoint-4" / "adapter_config.json").read_text())["target_modules"]) == 4
    assert alone[0].to_json() != alone[1].to_json()
    assert not (tmp_path / "search" / "selection.json").exists()
