"""WeightLoRA by direction: a planted truth is found, what stays computes the same, and what cannot be is refused."""

from __future__ import annotations

import json

import pytest
import torch

from lorazor.adapter.sites import find_sites, site_parameters
from lorazor.errors import BudgetError, SettingsError, UnsupportedAdapterError
from lorazor.select.weightlora import WeightLoraSettings
from lorazor.train.choose import ChooseSites
from tests.train.tiny_training import N_SITES, logits_of, make_trainer, tiny_llama

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
