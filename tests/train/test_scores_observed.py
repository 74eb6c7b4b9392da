"""The scores that a warm-up observes, against the same sums written out over the training's own tensors."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import TrainerCallback

from lorazor.adapter.sites import find_sites
from lorazor.errors import SettingsError
from lorazor.selection import Selection
from lorazor.train.callback import WeightLora
from tests.train.tiny_training import N_SITES, make_trainer, tiny_llama

STEPS, WARMUP = 5, 4


class Notebook(TrainerCallback):
    """A, B and their gradients around every optimizer step of the warm-up."""

    def __init__(self):
        self.before, self.after, self.gradients = [], [], []

    @staticmethod
    def parameters(model):
        return {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}

    def on_pre_optimizer_step(self, *_, model=None, **__):
        parameters = self.parameters(model)
        self.before.append({name: parameter.detach().clone() for name, parameter in parameters.items()})
        self.gradients.append({name: parameter.grad.clone() for name, parameter in parameters.items()})

    def on_optimizer_step(self, *_, model=None, **__):
        self.after.append({name: parameter.detach().clone() for name, parameter in self.parameters(model).items()})


def train(folder, score, **kwargs):
    callback, notebook = WeightLora(5, WARMUP, schedule="one-cut", score=score, seed=3, gate_lr=20.0), Notebook()
    trainer = make_trainer(folder, tiny_llama(), notebook, callback, steps=STEPS, **kwargs)
    trainer.train()
    rows = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    return callback, notebook, rows


def test_every_score_is_the_sum_that_its_equation_says(tmp_path):
    callback, notebook, rows = train(tmp_path, "loss-change")
    assert len(rows) == N_SITES
    for row in rows:
        names = [f"base_model.model.{row['site']}.lora_{part}.default.weight" for part in "AB"]
        change = sensitivity = probe = 0.0
        for step in range(WARMUP):
            before, after, gradients = (part[step] for part in (notebook.before, notebook.after, notebook.gradients))
            change -= sum(float((gradients[name] * (after[name] - before[name])).sum()) for name in names)
            weighted = sum(float((gradients[name] * before[name]).abs().sum()) for name in names)
            sensitivity = 0.85 * sensitivity + 0.15 * weighted
            if step < 2:
                probe += float(gradients[names[1]].abs().sum())
        assert row["loss-change"] == pytest.approx(change, rel=1e-4, abs=1e-7)
        assert row["sensitivity"] == pytest.approx(sensitivity, rel=1e-4)
        assert row["probe"] == pytest.approx(probe, rel=1e-4)
        A, B = (notebook.after[WARMUP - 1][name].double() for name in names)
        gated = row["gate"] * 2.0 * float(torch.linalg.matrix_norm(B @ A))  # the scale of tiny_llama is 2
        assert row["gate-norm"] == pytest.approx(gated, rel=1e-4)
    best = sorted(rows, key=lambda row: -row["loss-change"])[:5]
    assert {site.name for site in callback.selection.kept} == {row["site"] for row in best}


@pytest.mark.slow
@pytest.mark.parametrize("score", ["gate", "gate-norm", "probe", "sensitivity", "loss-change", "random", "last-layers"])
def test_any_score_chooses_and_all_scores_are_the_same_in_each_warmup(tmp_path, score):
    callback, _, rows = train(tmp_path, score)
    ranked = sorted(range(N_SITES), key=lambda place: -rows[place][score])  # stable: ties keep the earlier
    assert {site.name for site in callback.selection.kept} == {rows[place]["site"] for place in ranked[:5]}
    chosen = {site.name: site.score for site in Selection.load(tmp_path / "selection.json").sites}
    assert chosen == {row["site"]: pytest.approx(row[score]) for row in rows}
    _, _, others = train(tmp_path / "again", "gate")
    assert rows == others  # what is chosen by plays no part in what is observed


def test_one_cut_keeps_every_site_to_the_last_step(tmp_path):
    counts = []

    class Count(TrainerCallback):
        def on_step_end(self, *_, model=None, **__):
            counts.append(len(find_sites(model)))

        def on_optimizer_step(self, *_, **__):
            closed.append(int((callback._evidence.gated.gates.values == 0).sum()))

    closed = []
    callback = WeightLora(5, WARMUP, schedule="one-cut", gate_lr=20.0)
    make_trainer(tmp_path, tiny_llama(), callback, Count(), steps=STEPS - 1).train()
    assert counts == [N_SITES] * 3 + [5] and closed == [0] * 4


def test_a_score_that_a_projection_would_hide_is_refused(tmp_path):
    for schedule in ("progressive", "every-step"):
        callback = WeightLora(5, WARMUP, schedule=schedule, score="loss-change", dense_steps=1)
        with pytest.raises(SettingsError, match=r"score='loss-change' chooses at the end\. Pass schedule='one-cut'"):
            make_trainer(tmp_path, tiny_llama(), callback).train()
