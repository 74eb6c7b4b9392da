"""What a warm-up sees of directions, against gradients taken by hand, and against what `shrink` measures."""

from __future__ import annotations

import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from lorazor.adapter.directions import to_balanced_form_
from lorazor.adapter.folder import read_adapter
from lorazor.adapter.load import load
from lorazor.adapter.parts import Parts
from lorazor.adapter.sites import find_sites, site_parameters
from lorazor.data.batches import make_batches
from lorazor.data.examples import Example
from lorazor.errors import SettingsError
from lorazor.measure.gradients import gram_matrices
from lorazor.select.scoring import Scoring, score_named
from lorazor.select.weightlora import WeightLoraSettings
from lorazor.settings import FitSettings
from lorazor.train.answers import make_rows
from lorazor.train.choose import ChooseSites
from lorazor.train.direction_evidence import DirectionEvidence
from lorazor.train.fit import fit
from lorazor.train.moments import DirectionMoments
from tests.tiny_models import tiny_inputs
from tests.train.tiny_training import tiny_llama

ANSWERS = ["a", "abcd", "abcdefgh", "bc", "c", "defgh"]
EXAMPLES = [Example(n, f"after {n} comes:", answer, (answer,)) for n, answer in enumerate(ANSWERS)]
"""Answers of one to eight tokens, so that steps differ in how many they have."""


def watched(tiny, folder, *, steps=3, **settings):
    """A trained adapter in a warm-up at a learning rate that changes nothing; and what was seen, in the old basis."""
    loaded = load(tiny.adapter, is_trainable=True)
    callback, seen = ChooseSites(WeightLoraSettings(40, steps, score="fisher", by="direction"), 0), SimpleNamespace()
    choose = DirectionEvidence.choose

    def spy(self, has_one_rank):
        seen.moments = self.moments
        seen.matrices = self.moments.sums.matrices()
        seen.slopes = {site.name: self.moments.slopes(site.name) for site in self.sites}
        ranks = choose(self, has_one_rank)
        seen.scores = dict(self._scores)
        return ranks

    rows, _ = make_rows(loaded, EXAMPLES)
    training = FitSettings(steps=steps + 1, learning_rate=1e-30, rise_steps=0, weight_decay=0.0, **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DirectionEvidence, "choose", spy)
        fit(loaded.peft_model, loaded, rows, folder, training, 6 // steps, range(steps), [callback])
    seen.loaded, seen.callback = loaded, callback
    return seen


def by_hand(tiny):
    """Z and d nats / d z of every example, alone and without padding, by site: (tokens, r) each."""
    loaded = load(tiny.adapter)
    found = []
    for row in make_rows(loaded, EXAMPLES)[0]:
        outputs = {}

        def keep(name, module, args, output, outputs=outputs):
            outputs[name] = output.requires_grad_()

        undo = [site.module.lora_A["default"].register_forward_hook(partial(keep, site.name)) for site in loaded.sites]
        logits = loaded.model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        targets = torch.tensor(row["targets"])
        loss = cross_entropy(logits[targets != -100], targets[targets != -100], reduction="sum")
        gradients = torch.autograd.grad(loss, list(outputs.values()))
        for one in undo:
            one.remove()
        pairs = zip(outputs.values(), gradients, strict=True)
        found.append(dict(zip(outputs, [(z[0].detach().double(), u[0].double()) for z, u in pairs], strict=True)))
    return loaded.sites, found, sum(sum(t != -100 for t in row["targets"]) for row in make_rows(loaded, EXAMPLES)[0])


@pytest.mark.parametrize(
    "settings",
    [{}, {"accumulation": 2, "steps": 1}, {"gradient_checkpointing": True}],
    ids=["plain", "accumulated", "recomputed"],
)
def test_moments_and_slopes_of_rows_are_those_of_each_example_alone(tiny, tmp_path, settings):
    seen = watched(tiny, tmp_path, **settings)
    sites, rows, n_tokens = by_hand(tiny)
    assert seen.moments.sums.n_tokens == n_tokens
    for site in sites:
        pairs = [row[site.name] for row in rows]
        z, u = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        is_seen = u.any(dim=1)
        M_A, M_B = seen.matrices[site.name]
        if "q_proj" not in site.name:  # a first token attends to itself alone: rounding says whether its query is seen
            torch.testing.assert_close(M_A, z[is_seen].T @ z[is_seen] / is_seen.sum(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(M_B, u.T @ u / n_tokens, rtol=1e-4, atol=1e-6)
        expected = sorted((z.T @ u).flatten().tolist() for z, u in pairs)  # rows come in another order
        found = sorted(one.flatten().tolist() for one in seen.slopes[site.name])
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


def test_scores_and_basis_are_those_of_shrink_on_the_same_rows(tiny, tmp_path):
    seen = watched(tiny, tmp_path)
    loaded = load(tiny.adapter)
    batches = make_batches(EXAMPLES, loaded.tokenizer, loaded.task, 2, None, loaded.decoder_inputs).batches
    sigma2 = to_balanced_form_(loaded.sites, gram_matrices(loaded.model, loaded.sites, batches))
    parts = Parts(tuple(loaded.sites))
    scoring = Scoring(parts, read_adapter(tiny.adapter), loaded.model, batches, sigma2=sigma2)
    for name in ("fisher", "balanced"):
        expected = score_named(name)(scoring).values
        np.testing.assert_allclose(seen.scores[name].numpy(), expected, rtol=1e-3, atol=1e-3 * expected.max())
    for ours, theirs in zip(seen.loaded.sites, loaded.sites, strict=True):
        mine, other = (site_parameters(site.module, site.adapter) for site in (ours, theirs))
        torch.testing.assert_close(mine[1] @ mine[0], other[1] @ other[0], rtol=1e-4, atol=1e-5)
    best = sorted(range(len(parts)), key=lambda part: -seen.scores["fisher"][part] / parts.n_parameters[part])[:40]
    kept = {(site.name, j) for site in seen.callback.selection.kept for j in site.components or range(site.rank)}
    offsets = [part - parts.site_of.index(parts.site_of[part]) for part in range(len(parts))]
    assert kept == {(loaded.sites[parts.site_of[part]].name, offsets[part]) for part in best}


def test_autocast_sees_nearly_the_same(tiny, tmp_path):
    exact = watched(tiny, tmp_path / "exact").scores["fisher"]
    rounded = watched(tiny, tmp_path / "rounded", precision="bfloat16").scores["fisher"]
    assert not torch.equal(rounded, exact)
    assert float((rounded - exact).norm() / exact.norm()) < 0.1


def test_what_was_seen_survives_a_file(tiny, tmp_path):
    seen = watched(tiny, tmp_path / "run")
    torch.save(seen.moments.state_dict(), tmp_path / "state.pt")
    again = DirectionMoments(seen.loaded.sites, has_rows=True)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    changes = {site.name: (torch.eye(4).double(), torch.eye(4).double()) for site in seen.loaded.sites}
    expected, found = seen.moments.fisher(changes), again.fisher(changes)
    assert all(torch.equal(found[name], values) for name, values in expected.items())
    assert json.dumps([m.tolist() for pair in again.sums.matrices().values() for m in pair]) == json.dumps(
        [m.tolist() for pair in seen.matrices.values() for m in pair]
    )


def test_modules_that_mix_rows_are_named_and_only_slopes_of_rows_need_to_know():
    model, inputs = tiny_llama(), tiny_inputs("llama", rows=3)
    site = find_sites(model)[0]
    for has_rows in (True, False):
        moments = DirectionMoments([site], has_rows)
        moments.attach_(model)
        moments.begin_step(1.0)
        model(**inputs)
        down = site.module.lora_A[site.adapter]
        some_tokens = down(torch.ones(7, down.in_features))  # as an expert sees them, of three rows
        if has_rows:
            with pytest.raises(SettingsError, match=r"^model\.layers\.0\.mlp\.down_proj .*Rank .* by 'balanced'"):
                some_tokens.sum().backward()
        else:
            some_tokens.sum().backward()
            assert moments.sums.by_site[site.name][0] == 7
        moments.detach_()
