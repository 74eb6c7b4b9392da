"""Optimizer states follow a parameter: the oracle is an optimizer that trained the product f p all along."""

from __future__ import annotations

import warnings

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from transformers import Adafactor

from lorazor.errors import SettingsError
from lorazor.train.callback import WeightLora
from lorazor.train.optimizers import (
    UNITS,
    check_states,
    replace_parameter_,
    rescale_state_,
    units_of,
)
from tests.train.tiny_training import Watch, logits_of, make_trainer, tiny_llama

SHAPE = (6, 5)
RATE = 0.01

# name: how it is made of parameters and a learning rate; by which power of |f| its steps are longer on f p. Without eps
# and weight decay, which do not scale.
RULES = {
    "sgd": (lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9), 2),
    "nesterov": (lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, nesterov=True), 2),
    "adam": (lambda p, lr: torch.optim.Adam(p, lr, eps=0.0, amsgrad=True), 1),
    "adamw": (lambda p, lr: torch.optim.AdamW(p, lr, eps=0.0, weight_decay=0.0), 1),
    "nadam": (lambda p, lr: torch.optim.NAdam(p, lr, eps=0.0), 1),
    "radam": (lambda p, lr: torch.optim.RAdam(p, lr, eps=0.0, betas=(0.9, 0.5)), 2),  # with these betas plain momentum
    "adagrad": (lambda p, lr: torch.optim.Adagrad(p, lr, eps=0.0), 1),
    "rmsprop": (lambda p, lr: torch.optim.RMSprop(p, lr, eps=0.0, momentum=0.9), 1),
    "rmsprop-centered": (lambda p, lr: torch.optim.RMSprop(p, lr, eps=0.0, centered=True), 1),
    "adadelta": (lambda p, lr: torch.optim.Adadelta(p, 100 * lr, eps=1e-6), 1),
    "torch-adafactor": (lambda p, lr: torch.optim.Adafactor(p, lr, eps=(None, 0.0)), 0),
    "adafactor": (lambda p, lr: Adafactor(p, lr, eps=(1e-30, 0.0), scale_parameter=False, relative_step=False), 1),
    "adafactor-scaled": (lambda p, lr: Adafactor(p, None, eps=(1e-30, 0.0), warmup_init=True), 0),
    "bnb-adam": (lambda p, lr: bnb.optim.AdamW(p, lr, eps=0.0, weight_decay=0.0), 1),
    "bnb-ademamix": (lambda p, lr: bnb.optim.AdEMAMix(p, lr, eps=0.0, weight_decay=0.0), 1),
    "bnb-lion": (lambda p, lr: bnb.optim.Lion(p, lr), 1),
    "bnb-rmsprop": (lambda p, lr: bnb.optim.RMSprop(p, lr, eps=0.0), 1),
    "bnb-adagrad": (lambda p, lr: bnb.optim.Adagrad(p, lr, eps=0.0), 1),
    "bnb-momentum": (lambda p, lr: bnb.optim.SGD(p, lr, momentum=0.9), 2),
}
EIGHT_BITS = {
    "adam": lambda p, lr: bnb.optim.AdamW8bit(p, lr, eps=0.0, weight_decay=0.0, min_8bit_size=1),
    "lion": lambda p, lr: bnb.optim.Lion8bit(p, lr, min_8bit_size=1),
    "rmsprop": lambda p, lr: bnb.optim.RMSprop8bit(p, lr, eps=0.0, min_8bit_size=1),
    "ademamix": lambda p, lr: bnb.optim.AdEMAMix8bit(p, lr, eps=0.0, weight_decay=0.0, min_8bit_size=1),
}


def schedule_free(kind, **settings):
    """Its optimizers need to be told that they train."""

    def make(parameters, rate):
        optimizer = getattr(pytest.importorskip("schedulefree"), kind)(parameters, rate, **settings)
        optimizer.train()
        return optimizer

    return make


RULES |= {
    "schedule-free-sgd": (schedule_free("SGDScheduleFree", weight_lr_power=0.0), 2),
    "schedule-free-adamw": (schedule_free("AdamWScheduleFree", eps=1e-30, weight_lr_power=0.0), 1),
    "schedule-free-radam": (
        schedule_free("RAdamScheduleFree", betas=(0.9, 0.5), weight_lr_power=0.0, silent_sgd_phase=False),
        2,
    ),
}


def trainings(make, power, factor, shape=SHAPE, n_steps=8, switch=4):
    """The parameter of two trainings after every step: of the product all along, and of p until it is multiplied.

    The loss sees the same product in both, and gives it the same gradients: the steps on p are shorter by `power` until
    then, so that the product takes the same ones.
    """
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(n_steps, *shape, generator=generator)
    start = torch.randn(shape, generator=generator)
    seen = []
    for follows in (False, True):
        parameter = nn.Parameter(start.clone() / factor if follows else start.clone())
        scale = factor if follows else 1.0
        rate = RATE / abs(factor) ** power if follows else RATE
        optimizer = make([parameter], rate)
        path = []
        for step, gradient in enumerate(gradients):
            if follows and step == switch:
                with torch.no_grad():
                    parameter.mul_(factor)
                rescale_state_(optimizer, parameter, factor)
                scale = 1.0
                if optimizer.param_groups[0]["lr"] is not None:
                    optimizer.param_groups[0]["lr"] *= abs(factor) ** power
            parameter.grad = scale * gradient
            optimizer.step()
            check_states(optimizer)
            path.append(scale * parameter.detach().clone())
        seen.append(torch.stack(path))
    return seen


@pytest.mark.parametrize("factor", [2.0, -0.4])
@pytest.mark.parametrize("name", RULES)
def test_a_state_is_that_of_the_product_all_along(name, factor):
    make, power = RULES[name]
    expected, seen = trainings(make, power, factor)
    torch.testing.assert_close(seen, expected, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("factor", [2.0, -0.4])
@pytest.mark.parametrize("name", EIGHT_BITS)
def test_states_in_8_bits_follow_exactly_or_to_the_nearest_code(name, factor):
    """Two blocks of 256. Of a negative factor codes are the nearest ones: a training apart by less than they are."""
    expected, seen = trainings(EIGHT_BITS[name], 1, factor, shape=(24, 16))
    steps = expected.diff(dim=0)[4:].abs().mean()
    if factor > 0:
        torch.testing.assert_close(seen, expected, atol=2e-6, rtol=1e-4)
    elif name == "lion":  # its steps are signs
        assert ((seen - expected).abs() < RATE / 2).float().mean() > 0.97
    else:
        assert (seen - expected).abs().mean() < 0.05 * steps
    backwards = trainings(lambda p, lr: EIGHT_BITS[name](p, lr), 1, -factor, shape=(24, 16))[1]
    assert (backwards - seen).abs().mean() < (0.1 * steps if name != "lion" else 0.1 * RATE)


def test_a_parameter_multiplied_by_zero_starts_anew():
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([parameter])
    parameter.grad = torch.ones(3)
    optimizer.step()
    rescale_state_(optimizer, parameter, 0.0)
    assert parameter not in optimizer.state
    optimizer.step()
    assert optimizer.state[parameter]["step"] == 1


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", RULES)
def test_a_parameter_that_grew_goes_on_and_its_new_part_joins(name, axis):
    """The old part takes the steps that it would have taken alone; the new one is moved, by no more than about as much.

    Adafactor's steps are of the whole matrix: there, that they are near.
    """
    make, _ = RULES[name]
    generator = torch.Generator().manual_seed(1)
    gradients = torch.randn(8, *SHAPE, generator=generator)
    small = nn.Parameter(torch.randn(SHAPE, generator=generator))
    alone = nn.Parameter(small.detach().clone())
    optimizer, other = make([small], RATE), make([alone], RATE)
    for gradient in gradients[:4]:
        small.grad, alone.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        other.step()
    new = torch.randn([3 if place == axis else n for place, n in enumerate(SHAPE)], generator=generator)
    large = nn.Parameter(torch.cat([small.detach(), new], dim=axis))
    replace_parameter_(optimizer, small, large, axis)
    assert small not in optimizer.state
    before, n_old = large.detach().clone(), SHAPE[axis]
    for gradient in gradients[4:]:
        repeated = gradient.narrow(axis, 0, 3)
        large.grad, alone.grad = torch.cat([gradient, repeated], dim=axis), gradient.clone()
        optimizer.step()
        other.step()
    old, fresh = large.detach().narrow(axis, 0, n_old), large.detach().narrow(axis, n_old, 3)
    moved = (alone.detach() - before.narrow(axis, 0, n_old)).abs().mean()
    if "adafactor" in name:
        assert (old - alone.detach()).abs().mean() < 0.3 * moved
    else:
        torch.testing.assert_close(old, alone.detach())
    assert 0.02 * moved < (fresh - before.narrow(axis, n_old, 3)).abs().mean() < 4 * moved


def test_8_bit_states_of_what_grew_start_anew_and_it_is_said():
    small = nn.Parameter(torch.ones(16, 16))
    optimizer = EIGHT_BITS["adam"]([small], RATE)
    small.grad = torch.ones(16, 16)
    optimizer.step()
    large = nn.Parameter(torch.ones(20, 16))
    with pytest.warns(UserWarning, match=r"8-bit states of the sites that grew start anew"):
        replace_parameter_(optimizer, small, large, 0)
    large.grad = torch.ones(20, 16)
    optimizer.step()
    assert optimizer.state[large]["step"] == 1 and len(optimizer.state) == 1


class GaLoreAdamW(torch.optim.AdamW):
    """Any optimizer of another package."""


def test_unknown_optimizers_and_states_are_refused_by_name():
    parameter = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(SettingsError, match=r"test_optimizers\.GaLoreAdamW, of which it is not known.*torch\.AdamW"):
        units_of(GaLoreAdamW([parameter]))
    with pytest.raises(SettingsError, match=r"torch\.optim\.rprop\.Rprop"):
        units_of(torch.optim.Rprop([parameter]))
    optimizer = Adafactor([parameter], 1e-3, beta1=0.9, scale_parameter=False, relative_step=False)
    parameter.grad = torch.ones(2, 2)
    optimizer.step()
    with pytest.raises(SettingsError, match=r"keeps 'exp_avg' of a parameter"):
        check_states(optimizer)


def test_the_callback_refuses_them_before_the_first_step(tmp_path):
    model = tiny_llama()
    trainer = make_trainer(tmp_path, model, WeightLora(4, 2))
    trainer.optimizer = GaLoreAdamW([p for p in model.parameters() if p.requires_grad])
    steps = Watch({"on_step_begin": lambda _: None})
    trainer.add_callback(steps)
    with pytest.raises(SettingsError, match="GaLoreAdamW"):
        trainer.train()
    assert not steps.seen


NAMES = ["sgd", "adafactor", "rmsprop", "lion_32bit", "adamw_bnb_8bit"]


@pytest.mark.parametrize("name", NAMES)
def test_the_trainers_own_optimizers_train_on_through_the_cut(tmp_path, name):
    model, callback = tiny_llama(), WeightLora(4, 3, "every-step", gate_lr=30.0, dense_steps=1, grow="paper")
    after = Watch({"on_step_end": logits_of})
    trainer = make_trainer(tmp_path, model, callback, after, steps=6, optim=name)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "MatMul8bitLt|.*8-bit states")
        trainer.train()
    assert callback.selection is not None and len(callback.selection.kept) == 4
    moves = torch.stack(after.seen).diff(dim=0).abs().mean(dim=(1, 2, 3))
    assert 0 < moves[2:].max() < 5 * moves[0]  # steps after the cut are no longer than those before


def test_every_known_optimizer_is_tested():
    tested = set()
    for make in [*(make for make, _ in RULES.values()), *EIGHT_BITS.values()]:
        try:
            optimizer = make([nn.Parameter(torch.ones(2, 2))], RATE)
        except pytest.skip.Exception:
            continue
        tested |= {name for name, units in UNITS.items() if units is units_of(optimizer)}
    assert {name for name in UNITS if not name.startswith("schedulefree")} <= tested
