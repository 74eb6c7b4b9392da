"""Oracle: the published equations as a plain numpy loop, projecting by trying every subset of sites."""

from __future__ import annotations

import io
import math
from itertools import combinations

import numpy as np
import pytest
import torch

from benchmarks._published_weightlora import keep_largest_signed
from lorazor.errors import BudgetError, MeasureError, SettingsError
from lorazor.select.weightlora import Gates, WeightLoraSettings


def nearest_by_brute_force(gates, budget):
    """H_K: of all vectors with at most `budget` non-zeros taken from `gates`, the nearest."""
    candidates = []
    for subset in combinations(range(len(gates)), budget):
        candidate = np.zeros_like(gates)
        candidate[list(subset)] = gates[list(subset)]
        candidates.append(candidate)
    return min(candidates, key=lambda candidate: np.sum((candidate - gates) ** 2))


def greatest_by_brute_force(gates, budget):
    """The published code: of all subsets, the one of the greatest (signed) sum."""
    subset = max(combinations(range(len(gates)), budget), key=lambda subset: gates[list(subset)].sum())
    return np.where(np.isin(np.arange(len(gates)), subset), gates, 0)


def transcription(gradients, budgets, gate_lr, project=nearest_by_brute_force):
    """W <- H_k(w - eta grad), from w = 1; (steps, n_sites)."""
    gates, path = np.ones(gradients.shape[1], dtype=np.float64), []
    for gradient, budget in zip(gradients, budgets, strict=True):
        gates = project(gates - gate_lr * gradient, budget)
        path.append(gates)
    return np.array(path)


def followed(gates, gradients):
    path = []
    for gradient in gradients:
        gates.step(torch.tensor(gradient, dtype=torch.float32))
        path.append(gates.values.detach().numpy().copy())
    return np.array(path)


def random_gradients(seed, n_steps=50, n_sites=8):
    return np.random.default_rng(seed).normal(size=(n_steps, n_sites)).astype(np.float32)


def budgets_of(schedule, n_steps, n_sites, keep, dense_steps):
    """What the docstrings promise, step by step, in numpy."""
    steps = np.arange(1, n_steps + 1)
    if schedule == "every-step":
        return np.where(steps <= dense_steps, n_sites, keep).tolist()
    left = np.clip((n_steps - steps) / (n_steps - dense_steps), 0, 1)
    return (keep + np.ceil(np.round((n_sites - keep) * left**3, 9)).astype(int)).tolist()


@pytest.mark.parametrize("schedule", ["every-step", "progressive"])
@pytest.mark.parametrize("dense_steps", [0, 7, 49])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_gates_follow_the_published_equations(schedule, dense_steps, seed):
    gradients = random_gradients(seed)
    settings = WeightLoraSettings(3, 50, schedule, gate_lr=0.4, dense_steps=dense_steps)
    gates = Gates(8, settings)
    budgets = budgets_of(schedule, 50, 8, 3, dense_steps)
    expected = transcription(gradients, budgets, 0.4)
    np.testing.assert_allclose(followed(gates, gradients), expected, atol=1e-5)
    assert [settings.budget_at(step, 8) for step in range(1, 51)] == budgets
    support = np.vstack([np.ones((1, 8), dtype=bool), expected != 0])
    assert gates.n_changes == np.sum(support[1:] != support[:-1])
    assert gates.kept.tolist() == (expected[-1] != 0).tolist()
    assert int(gates.kept.sum()) == 3
    assert gates.is_finished


@pytest.mark.parametrize("seed", range(3))
def test_the_signed_projection_follows_the_published_code(seed):
    gradients = random_gradients(seed)
    gates = Gates(8, WeightLoraSettings(3, 50, "every-step", 0.4, 0), projection=keep_largest_signed)
    expected = transcription(gradients, [3] * 50, 0.4, greatest_by_brute_force)
    np.testing.assert_allclose(followed(gates, gradients), expected, atol=1e-5)


def test_a_gate_at_zero_still_moves_and_comes_back():
    gates = Gates(3, WeightLoraSettings(1, 4, "every-step", gate_lr=1.0, dense_steps=0))
    gates.step(torch.tensor([0.0, 0.5, 0.5]))
    assert gates.values.tolist() == [1, 0, 0]
    gates.step(torch.tensor([0.5, 2.0, 0.0]))  # 0.5, -2, 0: from zero to the largest magnitude
    assert gates.values.tolist() == [0, -2, 0]
    gates.step(torch.tensor([0.0, -1.0, 0.5]))  # 0, -1, -0.5
    assert gates.values.tolist() == [0, -1, 0]
    assert gates.n_changes == 2 + 2 + 0


def test_one_cut_at_the_end_is_every_step_with_all_others_dense():
    gradients = random_gradients(3, n_steps=6)
    gates = Gates(8, WeightLoraSettings(2, 6, "every-step", gate_lr=0.1, dense_steps=5))
    expected = nearest_by_brute_force(1 - 0.1 * gradients.sum(axis=0), 2)
    np.testing.assert_allclose(followed(gates, gradients)[-1], expected, atol=1e-6)
    assert gates.n_changes == 6


def train_gated_lora(n_steps, dense_steps):
    """Four gated LoRA sites side by side, B = 0 at the start; only the last one can lower the loss."""
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(4, 2, 6, generator=generator)
    B = torch.zeros(4, 3, 2, requires_grad=True)
    x, target = torch.randn(6, 20, generator=generator), torch.randn(3, 20, generator=generator)
    gates = Gates(4, WeightLoraSettings(1, n_steps, "every-step", gate_lr=0.5, dense_steps=dense_steps))
    first_gradients = []
    for _ in range(n_steps):
        each = torch.einsum("sor,srd,dt->sot", B, A, x)
        loss = ((gates.values[3] * each[3] - target) ** 2).mean() + 0 * torch.einsum("s,sot->", gates.values, each)
        for tensor in (gates.values, B):
            tensor.grad = None
        loss.backward()
        assert gates.values.grad is not None and B.grad is not None
        first_gradients.append(gates.values.grad.clone())
        gates.step(gates.values.grad)
        with torch.no_grad():
            B -= 0.05 * B.grad.sign()
    return gates, first_gradients


def test_a_fresh_lora_ties_so_projecting_at_once_keeps_the_first_site_whatever_the_data():
    gates, gradients = train_gated_lora(n_steps=6, dense_steps=0)
    assert gradients[0].tolist() == [0, 0, 0, 0]
    assert gates.kept.tolist() == [True, False, False, False]
    gates, gradients = train_gated_lora(n_steps=6, dense_steps=2)
    assert gradients[1][3] != 0
    assert gates.kept.tolist() == [False, False, False, True]


def test_values_stay_one_leaf_that_requires_grad():
    gates = Gates(4, WeightLoraSettings(2, 5, dense_steps=0))
    values = gates.values
    assert values.dtype == torch.float32 and values.is_leaf and values.requires_grad
    gates.step(torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.bfloat16))
    assert gates.values is values and values.is_leaf and values.requires_grad


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
def test_a_gate_that_is_not_a_number_names_its_site_and_changes_nothing(bad):
    gates = Gates(4, WeightLoraSettings(2, 5, gate_lr=5.0, dense_steps=0))
    gates.step(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    before = gates.state_dict()
    with pytest.raises(MeasureError, match=r"^The gate of site 2 became .* in warm-up step 2 \(gradient .*\)"):
        gates.step(torch.tensor([0.0, 0.0, bad, 0.0]))
    assert torch.equal(gates.state_dict()["values"], before["values"])
    assert gates.n_steps == 1


def test_a_gradient_of_another_shape_and_a_step_too_many_are_refused():
    gates = Gates(2, WeightLoraSettings(1, 1, dense_steps=0))
    with pytest.raises(MeasureError, match=r"shape \(3,\) for 2 gates"):
        gates.step(torch.zeros(3))
    gates.step(torch.tensor([0.0, 0.1]))
    with pytest.raises(SettingsError, match="warm-up of 1 steps is over"):
        gates.step(torch.zeros(2))


@pytest.mark.parametrize("schedule", ["every-step", "progressive"])
def test_a_saved_warmup_goes_on_as_if_never_stopped(schedule):
    gradients = random_gradients(5, n_steps=20)
    settings = WeightLoraSettings(3, 20, schedule, gate_lr=0.3, dense_steps=2)
    whole, first, second = (Gates(8, settings) for _ in range(3))
    path = followed(whole, gradients)
    followed(first, gradients[:9])
    state, file = first.state_dict(), io.BytesIO()
    first.step(torch.ones(8))  # the state is a copy: this changes the first only
    torch.save(state, file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    np.testing.assert_array_equal(followed(second, gradients[9:]), path[9:])
    assert (second.n_steps, second.n_changes) == (20, whole.n_changes)
    np.testing.assert_array_equal(second.trajectory.numpy(), np.stack(path))
    assert len(first.trajectory) == 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": {"keep": 2}}, r"keep=3, but the run to resume had keep=2"),
        ({"settings": {"schedule": "every-step"}}, r"schedule='one-cut', but .*'every-step'"),
        ({"values": torch.ones(7)}, r"saved gates are 7, but the model has 8"),
        ({"n_steps": None}, r"lack 'n_steps'"),
    ],
)
def test_resuming_with_other_settings_is_refused(change, message):
    gates = Gates(8, WeightLoraSettings(3, 20))
    state = gates.state_dict()
    for key, value in change.items():
        if value is None:
            del state[key]
        else:
            state[key] = {**state[key], **value} if isinstance(value, dict) else value
    with pytest.raises(SettingsError, match=message):
        gates.load_state_dict(state)
    assert gates.values.tolist() == [1] * 8 and gates.n_steps == 0


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"keep": 0}, BudgetError, r"keep=0 sites, but the model has 36 LoRA sites\. Pass a whole number, 1\.\.36"),
        ({"keep": 37}, BudgetError, r"keep=37"),
        ({"keep": 0.5}, BudgetError, r"keep=0\.5"),
        ({"keep": True}, BudgetError, r"keep=True"),
        ({"select_steps": 0}, SettingsError, r"select_steps=0"),
        ({"select_steps": 10.0}, SettingsError, r"select_steps=10\.0 is not a whole number"),
        ({"select_steps": 101}, SettingsError, r"select_steps=101 is more than the 100 steps"),
        ({"schedule": "every-step", "dense_steps": 50}, SettingsError, r"dense_steps=50 .* Pass 0\.\.49"),
        ({"schedule": "progressive", "dense_steps": -1}, SettingsError, r"dense_steps=-1"),
        (
            {"schedule": "linear"},
            SettingsError,
            r"schedule='linear' is unknown\. Pass one of one-cut, progressive",
        ),
        ({"score": "luck"}, SettingsError, r"score='luck' is unknown\. Pass one of gate, gate-norm, probe"),
        ({"schedule": "every-step", "score": "loss-change"}, SettingsError, r"score='loss-change' chooses at the end"),
        ({"keep": None}, BudgetError, r"keep=None sites and n_parameters=None: one budget is needed"),
        ({"n_parameters": 5}, BudgetError, r"keep=5 sites and n_parameters=5: one budget"),
        ({"keep": None, "n_parameters": 0}, BudgetError, r"params=0 numbers in A and B"),
        (
            {"keep": None, "n_parameters": 5, "schedule": "progressive"},
            SettingsError,
            r"a budget of parameters chooses at the end\. Pass schedule='one-cut'",
        ),
        ({"gate_lr": 0.0}, SettingsError, r"gate_lr=0\.0"),
        ({"gate_lr": math.nan}, SettingsError, r"gate_lr=nan"),
        ({"gate_lr": math.inf}, SettingsError, r"gate_lr=inf"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_any_work(changes, error, message):
    settings = WeightLoraSettings(**{"keep": 5, "select_steps": 50, **changes})
    with pytest.raises(error, match=message):
        settings.check(n_sites=36, total_steps=100)


def test_one_cut_projects_nothing_until_it_is_told_what_stays():
    gates = Gates(8, WeightLoraSettings(3, 20, "one-cut", gate_lr=0.3))
    gradients = random_gradients(5, n_steps=20)
    path = followed(gates, gradients)
    np.testing.assert_allclose(path[-1], 1 - 0.3 * gradients.sum(0), atol=1e-5)  # plain gradient descent
    kept = gates.settings.choose(gates.values.detach().abs(), [1] * 8)
    gates.keep_only(kept)
    assert kept.tolist() == (np.argsort(np.argsort(-np.abs(path[-1]))) < 3).tolist()
    np.testing.assert_allclose(gates.values.detach(), np.where(kept, path[-1], 0), atol=1e-6)
    assert gates.n_changes == 5


@pytest.mark.parametrize(("keep", "select_steps"), [(1, 100), (36, 11)])
def test_settings_at_the_ends_of_their_ranges_work(keep, select_steps):
    WeightLoraSettings(keep, select_steps, "progressive").check(n_sites=36, total_steps=100)
