"""Oracles: numpy transcriptions, autograd, and the loss that really was lost on the way down."""

from __future__ import annotations

import io
import math
from itertools import product

import numpy as np
import pytest
import torch

from lorazor.adapter.sites import Site
from lorazor.errors import MeasureError, SettingsError
from lorazor.select.projection import sites_for_count
from lorazor.select.scores import (
    WarmupObserver,
    control_scores,
    learned_scores,
    loss_change_of_step,
    probe_of_step,
    sensitivity_of_step,
)

SHAPES = [(6, 5, 2), (4, 9, 2), (3, 3, 4)]  # (d_in, d_out, r) of three sites; the last has r > d_out


def random_sites(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [
        [torch.randn(r, d_in, generator=generator).to(dtype), torch.randn(d_out, r, generator=generator).to(dtype)]
        for d_in, d_out, r in SHAPES
    ]


def made_sites(layers, stack="model.layers", kinds=("q_proj", "v_proj")):
    return [Site(f"{stack}.{layer}.{kind}", stack, layer, kind, 2, 1.0, 10) for layer, kind in product(layers, kinds)]


def test_gate_is_the_magnitude_and_gate_norm_the_norm_of_the_weight_that_is_added():
    sites = random_sites(0)
    gates, scalings = torch.tensor([-2.0, 0.5, 0.0], requires_grad=True), [2.0, 4.0, 1.0]
    expected = [
        np.linalg.norm(gate * scaling * B.numpy() @ A.numpy())
        for gate, scaling, (A, B) in zip(gates.tolist(), scalings, sites, strict=True)
    ]
    scores = learned_scores(gates, [A for A, _ in sites], [B for _, B in sites], scalings)
    assert scores["gate"].tolist() == [2, 0.5, 0]
    np.testing.assert_allclose(scores["gate-norm"].numpy(), expected, rtol=1e-5)


def test_the_norm_of_the_product_survives_cancellation():
    # B A = 0 although neither is: the Gram form sqrt(tr(A A^T B^T B)) would leave rounding errors of order 1.
    A, B = torch.full((2, 400), 30.0), 30 * torch.tensor([[1.0, -1.0]]).repeat(400, 1)
    norm = float(learned_scores(torch.ones(1), [A], [B], [1.0])["gate-norm"])
    assert norm < 1e-6 * float(A.norm() * B.norm())


def test_probe_is_what_the_first_gate_gradient_amounts_to():
    # A linear loss, so that the gradient of B is the same before and after the step: B <- -lr sign(grad B).
    generator = torch.Generator().manual_seed(1)
    learning_rate, gradients, gate_gradients = 1e-3, [], []
    for A, B in random_sites(2):
        x, direction = torch.randn(A.shape[1], generator=generator), torch.randn(B.shape[0], generator=generator)
        B = torch.zeros_like(B, requires_grad=True)
        gate = torch.ones((), requires_grad=True)
        (direction @ (gate * (B @ (A @ x)))).backward()
        assert B.grad is not None and gate.grad is not None
        assert float(gate.grad) == 0
        gradients.append(B.grad.clone())
        stepped = -learning_rate * B.grad.sign()
        gate_gradients.append(float(direction @ (stepped @ (A @ x))))
    np.testing.assert_allclose(-np.array(gate_gradients), learning_rate * probe_of_step(gradients).numpy(), rtol=1e-5)


def test_sensitivity_and_loss_change_are_their_equations():
    before, after, gradients = random_sites(3), random_sites(4), random_sites(5)
    as_numpy = [
        [tuple(t.numpy().astype(np.float64) for t in three) for three in zip(*site, strict=True)]
        for site in zip(before, after, gradients, strict=True)
    ]
    sensitivity = [sum(np.abs(old * gradient).sum() for old, _, gradient in site) for site in as_numpy]
    change = [-sum((gradient * (new - old)).sum() for old, new, gradient in site) for site in as_numpy]
    np.testing.assert_allclose(sensitivity_of_step(before, gradients).numpy(), sensitivity, rtol=1e-5)
    np.testing.assert_allclose(loss_change_of_step(before, after, gradients).numpy(), change, rtol=1e-4)


def gated_loss(sites, x, target):
    return ((sum(B @ (A @ x) for A, B in sites) - target) ** 2).mean()


def test_loss_change_adds_up_to_the_loss_decrease_and_finds_who_earned_it():
    generator = torch.Generator().manual_seed(6)
    x, target = torch.randn(5, 30, generator=generator), torch.randn(4, 30, generator=generator)
    sites = [[0.5 * torch.randn(2, 5, generator=generator), torch.zeros(4, 2)] for _ in range(3)]
    observer = WarmupObserver(3)
    learning_rates = [1e-3, 4e-3, 0.0]  # the third never moves
    first_loss = float(gated_loss(sites, x, target))
    for _ in range(150):
        leaves = [[tensor.clone().requires_grad_() for tensor in site] for site in sites]
        gated_loss(leaves, x, target).backward()
        gradients = [[tensor.grad for tensor in site] for site in leaves]
        before, sites = (
            sites,
            [
                [tensor - rate * gradient for tensor, gradient in zip(site, site_gradients, strict=True)]
                for site, site_gradients, rate in zip(sites, gradients, learning_rates, strict=True)
            ],
        )
        observer.add_step(before, sites, gradients)
    change = observer.scores()["loss-change"]
    decrease = first_loss - float(gated_loss(sites, x, target))
    assert decrease > 0.02
    assert float(change.sum()) == pytest.approx(decrease, rel=0.02)
    assert change[1] > change[0] > 0 and change[2] == 0


def test_loss_change_does_not_depend_on_how_size_is_shared_between_A_and_B():
    def scaled(sites, factor):
        return [[factor * A, B / factor] for A, B in sites]

    before, after, gradients = random_sites(7), random_sites(8), random_sites(9)
    there = loss_change_of_step(scaled(before, 8.0), scaled(after, 8.0), scaled(gradients, 1 / 8.0))
    np.testing.assert_allclose(there.numpy(), loss_change_of_step(before, after, gradients).numpy(), rtol=1e-5)


def test_a_missing_gradient_counts_as_zero():
    before, after, gradients = random_sites(3), random_sites(4), random_sites(5)
    zeros = [[torch.zeros_like(A), torch.zeros_like(B)] for A, B in gradients[:1]] + gradients[1:]
    missing = [[None, None], *gradients[1:]]
    assert torch.equal(loss_change_of_step(before, after, missing), loss_change_of_step(before, after, zeros))
    assert torch.equal(sensitivity_of_step(before, missing), sensitivity_of_step(before, zeros))
    assert torch.equal(probe_of_step([site[1] for site in missing]), probe_of_step([site[1] for site in zeros]))
    assert loss_change_of_step(before, after, missing)[0] == 0


def test_bfloat16_parameters_are_summed_in_float32():
    sites, ones = [[torch.full((2, 600), 0.01, dtype=torch.bfloat16)]], [[torch.ones(2, 600, dtype=torch.bfloat16)]]
    expected = 1200 * float(torch.tensor(0.01, dtype=torch.bfloat16))
    assert sensitivity_of_step(sites, ones).dtype == torch.float32
    assert float(sensitivity_of_step(sites, ones)) == pytest.approx(expected, rel=1e-5)


def test_a_site_with_a_missing_tensor_is_refused():
    with pytest.raises(ValueError, match="zip"):
        loss_change_of_step(random_sites(0), random_sites(1), random_sites(2)[:2])


def observed(observer, n_steps, first=0):
    for step in range(first, first + n_steps):
        observer.add_step(random_sites(100 + step), random_sites(200 + step), random_sites(300 + step))
    return observer


def test_the_observer_is_the_running_sums_of_its_docstring():
    scores = observed(WarmupObserver(3, n_probe_steps=2, smoothing=0.5), 4).scores()
    steps = [(random_sites(100 + t), random_sites(200 + t), random_sites(300 + t)) for t in range(4)]
    probe = [sum(np.abs(steps[t][2][i][1].numpy()).sum() for t in range(2)) for i in range(3)]
    smoothed = np.zeros(3)
    for before, _, gradients in steps:
        smoothed = 0.5 * smoothed + 0.5 * sensitivity_of_step(before, gradients).numpy()
    change = sum(loss_change_of_step(*step).numpy() for step in steps)
    np.testing.assert_allclose(scores["probe"].numpy(), probe, rtol=1e-5)
    np.testing.assert_allclose(scores["sensitivity"].numpy(), smoothed, rtol=1e-5)
    np.testing.assert_allclose(scores["loss-change"].numpy(), change, rtol=1e-4, atol=1e-5)
    assert set(scores) == {"probe", "sensitivity", "loss-change"}


def test_a_saved_observer_goes_on_as_if_never_stopped():
    whole = observed(WarmupObserver(3, n_probe_steps=4), 6)
    file = io.BytesIO()
    torch.save(observed(WarmupObserver(3, n_probe_steps=4), 3).state_dict(), file)
    file.seek(0)
    resumed = WarmupObserver(3, n_probe_steps=4)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for name, values in observed(resumed, 3, first=3).scores().items():
        assert torch.equal(values, whole.scores()[name])
    assert resumed.n_steps == 6


@pytest.mark.parametrize(
    ("observer", "message"),
    [
        (WarmupObserver(4), "are of 3 sites, but the model has 4"),
        (WarmupObserver(3, n_probe_steps=2), "n_probe_steps=2, but the run to resume had n_probe_steps=1"),
        (WarmupObserver(3, smoothing=0.5), "smoothing=0.5, but"),
    ],
)
def test_resuming_another_observer_is_refused(observer, message):
    with pytest.raises(SettingsError, match=message):
        observer.load_state_dict(observed(WarmupObserver(3), 1).state_dict())
    with pytest.raises(SettingsError, match="lack 'loss-change'"):
        observer.load_state_dict({**WarmupObserver(4).state_dict(), "sums": {"probe": 0, "sensitivity": 0}})


def test_scores_that_do_not_exist_are_errors():
    with pytest.raises(MeasureError, match="No step was seen"):
        WarmupObserver(3).scores()
    observer = WarmupObserver(3)
    gradients = random_sites(2)
    gradients[1][0][0, 0] = math.nan
    observer.add_step(random_sites(0), random_sites(1), gradients)
    with pytest.raises(MeasureError, match="sensitivity of site 1 is nan after 1 steps"):
        observer.scores()


@pytest.mark.parametrize("settings", [{"n_probe_steps": 0}, {"smoothing": 1.0}, {"smoothing": -0.1}])
def test_observer_settings_out_of_range(settings):
    with pytest.raises(SettingsError, match=next(iter(settings))):
        WarmupObserver(3, **settings)


def kept_layers(sites, scores, budget):
    kept = sites_for_count(scores, budget).tolist()
    return sorted({site.layer for site, keep in zip(sites, kept, strict=True) if keep})


def test_random_sets_are_seeded_and_uniform():
    def random(seed, n_layers=3):
        return control_scores(made_sites(range(n_layers)), seed)["random"]

    assert torch.equal(random(4, 15), random(4, 15))
    assert not torch.equal(random(4, 15), random(5, 15))
    counts = sum(sites_for_count(random(seed), 2).int() for seed in range(1200))
    # Each site is in 1/3 of the sets: 400 of 1200, standard deviation 16.
    assert all(abs(int(count) - 400) < 80 for count in counts)


def test_first_and_last_layers_keep_whole_layers_at_the_ends():
    sites = made_sites(range(6))
    scores = control_scores(sites, seed=0)
    assert kept_layers(sites, scores["first-layers"], 4) == [0, 1]
    assert kept_layers(sites, scores["last-layers"], 4) == [4, 5]
    # Ties within a layer keep the earlier site, at either end.
    for name in ("first-layers", "last-layers"):
        kept = sites_for_count(scores[name], 5).tolist()
        names = [site.kind for site, keep in zip(sites, kept, strict=True) if keep]
        assert sorted(names) == ["q_proj"] * 3 + ["v_proj"] * 2


def test_stacks_follow_each_other_and_sites_outside_come_last():
    sites = made_sites(range(2), "encoder.layers") + made_sites(range(2), "decoder.layers")
    sites.append(Site("lm_head", None, None, "lm_head", 2, 1.0, 10))
    scores = control_scores(sites, seed=0)
    assert scores["last-layers"].tolist() == [1, 1, 2, 2, 3, 3, 4, 4, 5]
    assert scores["first-layers"].tolist() == [5, 5, 4, 4, 3, 3, 2, 2, 1]


def test_no_site_is_worth_nothing_by_a_control():
    for scores in control_scores(made_sites(range(6)), seed=1).values():
        assert scores.min() > 0
