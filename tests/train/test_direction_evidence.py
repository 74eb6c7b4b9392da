"""WeightLoRA by direction: a planted truth is found, what stays computes the same, and what cannot be is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from lorazor.adapter.prune import fold_alphas_
from lorazor.adapter.sites import find_sites, site_parameters
from lorazor.errors import BudgetError, SettingsError, UnsupportedAdapterError
from lorazor.select.weightlora import WeightLoraSettings
from lorazor.train.callback import WeightLora
from lorazor.train.choose import ChooseSites
from tests.tiny_models import tiny_model
from tests.train.tiny_training import N_LAYERS, N_SITES, Watch, logits_of, make_trainer, tiny_llama

STILL = {"learning_rate": 1e-30, "weight_decay": 0.0, "max_grad_norm": 0.0}
"""Nothing moves."""


def settings_of(keep=None, steps=3, **changes):
    return WeightLoraSettings(keep, steps, score=changes.pop("score", "fisher"), by="direction", **changes)


@torch.no_grad()
def hide(model, name, others):
    """One direction behind full factors at one site, `others` times what is there at the rest."""
    generator = torch.Generator().manual_seed(5)
    for site in find_sites(model):
        A, B = site_parameters(site.module, site.adapter)
        if site.name != name:
            B.mul_(others)
            continue
        mix, one = torch.randn(len(A), len(A), generator=generator), torch.zeros(len(A), len(A))
        one[0, 0] = 1.0  # B A has rank 1, and no row of A and no column of B shows which
        A.copy_(mix @ A)
        B.copy_(B @ one @ torch.linalg.inv(mix))


@pytest.mark.parametrize("score", ["fisher", "balanced", "energy"])
def test_the_one_direction_that_is_there_is_kept_by_name(tmp_path, score):
    name = "model.layers.1.mlp.up_proj"
    model = tiny_llama(rank=4)
    hide(model, name, others=0.0)
    expected = logits_of(model)
    callback = ChooseSites(settings_of(keep=1, score=score), 0)
    make_trainer(tmp_path, model, callback, steps=4, **STILL).train()
    torch.testing.assert_close(logits_of(model), expected, atol=1e-5, rtol=0)  # the basis is another one
    (kept,) = callback.selection.kept
    assert (kept.name, kept.components, kept.rank) == (name, (0,), 4)
    A, B = site_parameters(next(one for one in find_sites(model) if one.name == name).module, "default")
    with torch.no_grad():
        A[1:] = 0
        assert float((A[0].norm() - B[:, 0].norm()).abs()) < 1e-4
    torch.testing.assert_close(logits_of(model), expected, atol=1e-5, rtol=0)


def test_the_same_direction_in_noise_comes_first(tmp_path):
    name = "model.layers.0.self_attn.v_proj"
    model = tiny_llama(rank=4)
    hide(model, name, others=0.02)
    callback = ChooseSites(settings_of(keep=1), 0)
    make_trainer(tmp_path, model, callback, steps=4, **STILL).train()
    assert [(site.name, site.components) for site in callback.selection.kept] == [(name, (0,))]
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    worth = {line["site"]: line["fisher"] for line in lines}
    assert len(worth) == N_SITES and all(len(values) == 4 for values in worth.values())
    assert max((max(values), site) for site, values in worth.items())[1] == name
    assert [line["score"] for line in lines] == pytest.approx([sum(line["fisher"]) for line in lines])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: tiny_llama(use_dora=True),
            UnsupportedAdapterError,
            r"is DoRA \(use_dora\), which stays or goes whole",
        ),
        (
            lambda: tiny_llama(target_modules=["embed_tokens", "q_proj"]),
            UnsupportedAdapterError,
            r"embed_tokens is an embedding.*no directions\. Leave it out of target_modules",
        ),
    ],
)
def test_sites_without_directions_are_refused_by_name(tmp_path, make, error, message):
    with pytest.raises(error, match=message):
        make_trainer(tmp_path, make(), ChooseSites(settings_of(keep=3), 0), steps=4).train()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"score": "gate"}, SettingsError, r"score='gate' does not rank by direction\. Pass one of fisher, balanced"),
        ({"by": "site"}, SettingsError, r"score='fisher' does not rank by site\. Pass one of gate"),
        ({"schedule": "progressive"}, SettingsError, r"directions have no gates in training.*schedule='one-cut'"),
        ({"grow": "served"}, SettingsError, r"WeightLoRA\+ makes it higher"),
        ({"keep": 29}, BudgetError, r"keep=29 directions, but the model has 28 LoRA directions"),
        ({"by": "layer"}, SettingsError, r"by='layer' is unknown\. Pass one of site, direction"),
    ],
)
def test_settings_that_do_not_go_together(changes, error, message):
    settings = WeightLoraSettings(**{"keep": 3, "select_steps": 3, "score": "fisher", "by": "direction", **changes})
    with pytest.raises(error, match=message):
        settings.check(28, 10)


# In place

KEEP, STEPS, WARMUP = 9, 6, 3


def in_place(**changes):
    return WeightLora(**{"keep": KEEP, "select_steps": WARMUP, "by": "direction", **changes})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A training with a cut in it, every step saved; and what the model computed after each."""
    folder, watch, callback = tmp_path_factory.mktemp("trained"), Watch({"on_step_end": logits_of}), in_place()
    trainer = make_trainer(folder, tiny_llama(), callback, watch, steps=STEPS, save_strategy="steps", save_steps=1)
    trainer.train()
    return folder, trainer, callback, watch.seen


def test_the_cut_model_computes_what_its_directions_computed(tmp_path, trained):
    """A selection run sees the same steps and leaves all directions in the model: those that go are set to 0."""
    *_, callback, seen = trained
    model, choosing = tiny_llama(), ChooseSites(settings_of(keep=KEEP, steps=WARMUP), 0)
    make_trainer(tmp_path, model, choosing, steps=STEPS).train()
    assert choosing.selection.sites == callback.selection.sites
    kept = {one.name: list(one.components or range(2)) for one in choosing.selection.kept}
    assert sum(map(len, kept.values())) == KEEP and len(kept) < N_SITES
    with torch.no_grad():
        for site in find_sites(model):
            gone = [j for j in range(2) if j not in kept.get(site.name, [])]
            site.module.lora_B["default"].weight[:, gone] = 0
    torch.testing.assert_close(logits_of(model), seen[WARMUP - 1], atol=1e-5, rtol=0)


def test_what_is_saved_is_an_ordinary_adapter_at_any_time(trained, tmp_path):
    """In stock PEFT; scalings stay those of the warm-up, in an `alpha_pattern` that can be folded away."""
    folder, _, callback, seen = trained
    for step, expected in enumerate(seen, start=1):
        checkpoint = folder / f"checkpoint-{step}"
        loaded = PeftModel.from_pretrained(tiny_model("llama", N_LAYERS), checkpoint)
        torch.testing.assert_close(logits_of(loaded), expected, atol=1e-5, rtol=0)
        config = json.loads((checkpoint / "adapter_config.json").read_text())
        ranks = {site.name: site.rank for site in find_sites(loaded)}
        if step >= WARMUP:
            assert ranks == {one.name: one.kept_rank for one in callback.selection.kept}
            assert {*ranks.values()} == {1, 2} and config["rank_pattern"] and config["lora_alpha"] == 4
            assert {site.scaling for site in find_sites(loaded)} == {2.0} and config["alpha_pattern"]
            folded = shutil.copytree(checkpoint, tmp_path / str(step))
            fold_alphas_(folded)
            assert json.loads((folded / "adapter_config.json").read_text())["alpha_pattern"] == {}
            loaded = PeftModel.from_pretrained(tiny_model("llama", N_LAYERS), folded)
            torch.testing.assert_close(logits_of(loaded), expected, atol=1e-5, rtol=0)


def test_the_optimizer_trains_what_stays_and_nothing_else(trained):
    folder, trainer, _, seen = trained
    live = {id(p) for p in trainer.model.parameters() if p.requires_grad}
    held = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == live and len(held) == len(live)
    before, after = (load_file(folder / f"checkpoint-{n}" / "adapter_model.safetensors") for n in (WARMUP, STEPS))
    assert all((after[name] - tensor).abs().max() > 0 for name, tensor in before.items())
    for site in find_sites(PeftModel.from_pretrained(tiny_model("llama", N_LAYERS), folder / f"checkpoint-{WARMUP}")):
        A, B = site_parameters(site.module, site.adapter)
        torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0), rtol=1e-4, atol=1e-6)


def test_a_budget_for_everything_changes_nothing(tmp_path):
    model, watch = tiny_llama(use_rslora=True), Watch({"on_step_end": logits_of})
    before = logits_of(model)
    n_parameters = sum(site.n_parameters for site in find_sites(model))
    callback = in_place(keep=None, params=n_parameters)
    trainer = make_trainer(tmp_path, model, callback, watch, steps=4, **STILL)
    trainer.train()
    assert [site.kept_rank for site in callback.selection.sites] == [2] * N_SITES
    for logits in watch.seen:
        torch.testing.assert_close(logits, before, atol=1e-5, rtol=0)
    trainer.save_model(str(tmp_path / "saved"))
    assert json.loads((tmp_path / "saved" / "adapter_config.json").read_text())["use_rslora"] is False
    loaded = PeftModel.from_pretrained(tiny_model("llama", N_LAYERS), tmp_path / "saved")
    torch.testing.assert_close(logits_of(loaded), before, atol=1e-5, rtol=0)


@pytest.mark.parametrize("step", [2, pytest.param(WARMUP, marks=pytest.mark.slow), 5])
def test_a_resumed_training_ends_like_one_without_a_break(trained, tmp_path, step):
    folder, _, whole, _ = trained
    shutil.copytree(folder / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    model = tiny_llama()
    if step >= WARMUP:
        base = tiny_model("llama", N_LAYERS)
        model = PeftModel.from_pretrained(base, tmp_path / f"checkpoint-{step}", is_trainable=True)
    callback = in_place()
    trainer = make_trainer(tmp_path, model, callback, steps=STEPS, save_strategy="steps", save_steps=1)
    trainer.train(resume_from_checkpoint=True)
    assert callback.selection.to_json() == whole.selection.to_json()
    end = f"checkpoint-{STEPS}/adapter_model.safetensors"
    expected, seen = load_file(folder / end), load_file(tmp_path / end)
    assert seen.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(seen[name], tensor, atol=1e-6, rtol=0)
