"""What optimizers remember of a parameter, and how it follows when the parameter is multiplied, grows or goes.

    p' = f p,   Loss unchanged:   g' = g / f

A state is measured in something, and that says how it follows: a mean of gradients is divided by f, one of squared
gradients by f^2, a copy of the parameter is multiplied by f, and what holds normalised steps keeps its size and takes
the sign of f. The state is then that of an optimizer whose gradients had been g / f all along. Two things do not scale
and are as they were: eps in a denominator, and a weight decay that is added to the gradient.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from lorazor.errors import SettingsError


class Unit(Enum):
    """What a state of an optimizer is measured in."""

    GRADIENT = "gradient"
    SQUARED_GRADIENT = "squared gradient"
    DIRECTION = "gradient over its size"
    SQUARED_DIRECTION = "squared gradient over its size"
    PARAMETER = "parameter"
    NONE = "count"

    def factor(self, f: float) -> float:
        """What a state is multiplied by when its parameter is multiplied by f, not 0."""
        return {
            Unit.GRADIENT: 1 / f,
            Unit.SQUARED_GRADIENT: 1 / f**2,
            Unit.DIRECTION: math.copysign(1.0, f),
            Unit.PARAMETER: f,
        }.get(self, 1.0)


_ADAM = {
    "step": Unit.NONE,
    "exp_avg": Unit.GRADIENT,
    "exp_avg_sq": Unit.SQUARED_GRADIENT,
    "max_exp_avg_sq": Unit.SQUARED_GRADIENT,
}
_BLOCKS = dict.fromkeys(("step", "qmap1", "qmap2", "absmax1", "absmax2"), Unit.NONE)  # absmax goes with its state
_ONE_MEAN = {**_BLOCKS, "state1": Unit.GRADIENT}
_ONE_SQUARE = {**_BLOCKS, "state1": Unit.SQUARED_GRADIENT}
_TWO = {**_BLOCKS, "state1": Unit.GRADIENT, "state2": Unit.SQUARED_GRADIENT}
_FACTORED = dict.fromkeys(
    ("exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq", "row_var", "col_var", "variance"), Unit.SQUARED_GRADIENT
)

UNITS: Mapping[str, Mapping[str, Unit]] = {
    "torch.SGD": {"momentum_buffer": Unit.GRADIENT},
    "torch.Adam": _ADAM,
    "torch.AdamW": _ADAM,
    "torch.NAdam": {**_ADAM, "mu_product": Unit.NONE},
    "torch.RAdam": _ADAM,
    "torch.Adagrad": {"step": Unit.NONE, "sum": Unit.SQUARED_GRADIENT},
    "torch.RMSprop": {
        "step": Unit.NONE,
        "square_avg": Unit.SQUARED_GRADIENT,
        "grad_avg": Unit.GRADIENT,
        "momentum_buffer": Unit.DIRECTION,  # of gradients that are divided by their root mean square already
    },
    "torch.Adadelta": {
        "step": Unit.NONE,
        "square_avg": Unit.SQUARED_GRADIENT,
        "acc_delta": Unit.SQUARED_DIRECTION,
    },
    "torch.Adafactor": {"step": Unit.NONE, **_FACTORED},
    # with beta1 there is `exp_avg`, a mean of steps whose unit hangs on scale_parameter: not known here
    "transformers.Adafactor": {"step": Unit.NONE, "RMS": Unit.NONE, **_FACTORED},
    "schedulefree.SGDScheduleFree": {"z": Unit.PARAMETER},
    "schedulefree.AdamWScheduleFree": {"z": Unit.PARAMETER, "exp_avg_sq": Unit.SQUARED_GRADIENT},
    "schedulefree.RAdamScheduleFree": {"z": Unit.PARAMETER, "exp_avg_sq": Unit.SQUARED_GRADIENT},
    # in 32 bits, or in blocks of 8; paged or not
    "bitsandbytes.adam": _TWO,
    "bitsandbytes.ademamix": _TWO,
    "bitsandbytes.lion": _ONE_MEAN,
    "bitsandbytes.momentum": _ONE_MEAN,
    "bitsandbytes.rmsprop": _ONE_SQUARE,
    "bitsandbytes.adagrad": _ONE_SQUARE,
}
"""The states of every optimizer that is known, by its package and class; of bitsandbytes by its rule of update.

What is not here is refused: optimizers that project gradients (GaLore, APOLLO) or take their steps in the backward pass
(LOMO), that treat a parameter by its place among the others (GrokAdamW), or that no test here has run.
"""

_OF_ROWS, _OF_COLUMNS = ("exp_avg_sq_row", "row_var"), ("exp_avg_sq_col", "col_var")


def units_of(optimizer: torch.optim.Optimizer) -> Mapping[str, Unit]:
    """What the states of an optimizer are measured in, by their names.

    Args:
        optimizer: a torch optimizer, or accelerate's wrapper of one.
    Raises:
        SettingsError: an optimizer that is not in `UNITS`.
    """
    inner: Any = optimizer
    while isinstance(getattr(inner, "optimizer", None), torch.optim.Optimizer):  # accelerate's wrapper
        inner = inner.optimizer
    kind = type(inner)
    package = kind.__module__.partition(".")[0]
    name = f"{package}.{inner.optimizer_name if hasattr(inner, 'optimizer_name') else kind.__name__}"
    if name not in UNITS:
        raise SettingsError(
            f"The optimizer is {kind.__module__}.{kind.__name__}, of which it is not known here how its state follows "
            f"a site whose gate is multiplied into B. Pass optim='adamw_torch', another of {', '.join(sorted(UNITS))}; "
            f"or choose the sites with 'lorazor select' and train them with any optimizer."
        )
    return UNITS[name]


def check_states(optimizer: torch.optim.Optimizer) -> None:
    """Refuse states that `UNITS` does not list, once the optimizer has taken its first step.

    Raises:
        SettingsError: which state, of which optimizer.
    """
    units = units_of(optimizer)
    for state in optimizer.state.values():
        if strangers := sorted(set(state) - set(units)):
            raise SettingsError(
                f"The optimizer keeps {strangers[0]!r} of a parameter, of which it is not known here how it follows a "
                f"site whose gate is multiplied into B. Leave the setting off that makes it, or pass "
                f"optim='adamw_torch'."
            )


def rescale_state_(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, factor: float) -> None:
    """Let an optimizer's state follow a parameter that was multiplied: p' = f p.

    Without it, momentum would push a site with a negative gate the wrong way. 8-bit states keep their codes where f is
    positive, and take the nearest codes of the opposite numbers where it is negative.

    Args:
        optimizer: one of `UNITS`, or accelerate's wrapper.
        parameter: what was multiplied.
        factor: f; by 0, the state goes, since none of it says anything of the parameter any more.
    Raises:
        SettingsError: see `units_of`.
    """
    units, state = units_of(optimizer), optimizer.state.get(parameter)
    if not state:
        return
    if factor == 0:
        del optimizer.state[parameter]
        return
    for name, unit in units.items():
        value, scale = state.get(name), unit.factor(factor)
        if not isinstance(value, Tensor) or scale == 1:
            continue
        if value.dtype == torch.uint8:
            number = name[-1]  # state1 has absmax1 and qmap1
            state[f"absmax{number}"].mul_(abs(scale))
            if scale < 0:
                value.copy_(_opposite_codes(state[f"qmap{number}"])[value.long()])
        else:
            value.mul_(scale)


def _opposite_codes(numbers: Tensor) -> Tensor:
    """For each of 256 codes, the code whose number is nearest to minus its own, (256,) uint8."""
    return (numbers[:, None] + numbers[None]).abs().argmin(dim=1).to(torch.uint8)


def replace_parameter_(optimizer: torch.optim.Optimizer, before: nn.Parameter, after: nn.Parameter, axis: int) -> None:
    """Put a parameter that grew along one axis in the place of the old one, with the state of its old part.

    The new part starts without momentum, and with the mean second moment of the old one, so that its first steps are no
    larger. States in 8-bit blocks run across rows: they start anew, and a warning says so.

    Args:
        optimizer: one of `UNITS`, or accelerate's wrapper.
        before: (rows, columns).
        after: its numbers, and new ones behind them.
        axis: 0, rows are new; 1, columns are.
    Raises:
        SettingsError: see `units_of`.
    """
    if before is after:
        return
    units = units_of(optimizer)
    state = exchange_parameter_(optimizer, before, after)
    if not state:
        return
    if any(isinstance(value, Tensor) and value.dtype == torch.uint8 for value in state.values()):
        message = "The optimizer's 8-bit states of the sites that grew start anew, as at the first step."
        warnings.warn(message, stacklevel=2)
        return
    optimizer.state[after] = {
        name: _grown(name, value, units[name], before, after, axis) for name, value in state.items()
    }


def exchange_parameter_(optimizer: torch.optim.Optimizer, before: nn.Parameter, after: nn.Parameter) -> Any:
    """Put a parameter in the place of another, without a state; the state of the other, if it had one."""
    for group in optimizer.param_groups:
        group["params"] = [after if parameter is before else parameter for parameter in group["params"]]
    before.grad = None
    return optimizer.state.pop(before, None)


def forget_parameters_(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Take parameters and their state out of an optimizer; their groups stay, for the learning-rate schedule."""
    gone = {id(parameter): parameter for parameter in parameters}
    for group in optimizer.param_groups:
        stays = [place for place, parameter in enumerate(group["params"]) if id(parameter) not in gone]
        for key in ("params", "param_names"):
            if key in group:
                group[key] = [group[key][place] for place in stays]
    for parameter in gone.values():
        optimizer.state.pop(parameter, None)
        parameter.grad = None


def _grown(name: str, value: Any, unit: Unit, before: Tensor, after: Tensor, axis: int) -> Any:
    """One state, longer by what the parameter has grown."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    if name in (*_OF_ROWS, *_OF_COLUMNS):
        if axis != (0 if name in _OF_ROWS else 1):
            return value
        place = 0 if name in _OF_ROWS else -1
    else:
        place = axis + value.ndim - before.ndim  # AdEMAMix keeps two means in one tensor, (2, rows, columns)
    n_new = after.shape[axis] - before.shape[axis]
    if unit is Unit.PARAMETER:  # schedule-free: the new part is where it was drawn
        new = after.detach().narrow(axis, before.shape[axis], n_new).to(value)
    else:
        new = value.mean(place, keepdim=True).repeat_interleave(n_new, place)
        new = new if unit in (Unit.SQUARED_GRADIENT, Unit.SQUARED_DIRECTION) else torch.zeros_like(new)
    return torch.cat([value, new], dim=place)
