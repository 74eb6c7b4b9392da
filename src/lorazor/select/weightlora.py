"""WeightLoRA: learn one gate per LoRA site, and keep only a budget of them.

    min over w  min over A, B  Loss   subject to   ||w||_0 <= K

Here is the gate vector and its update, without a model or a trainer. Source: Veprikov et al., arXiv:2506.02724.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lorazor.errors import BudgetError, MeasureError, SettingsError
from lorazor.select.projection import (
    check_keep,
    check_parameters,
    keep_largest,
    progressive_budget,
    sites_for_count,
    sites_for_parameters,
)
from lorazor.select.ranks import Growth, Shape, paper_ranks, served_ranks
from lorazor.select.scores import check_score

Schedule = Literal["one-cut", "progressive", "every-step"]
Unit = Literal["site", "direction"]
Projection = Callable[[Tensor, int], Tensor]


@dataclasses.dataclass(frozen=True)
class WeightLoraSettings:
    """How WeightLoRA chooses the sites to keep.

    Attributes:
        keep: K, sites that stay after the warm-up, 1..n_sites; None where `n_parameters` is the budget.
        select_steps: T, optimizer steps over which gates are learned; after the last one K sites are left.
        schedule: "one-cut" keeps every site until T; "progressive" lets the number kept fall from n to K on a cubic
            curve; "every-step" keeps K after each step (StoIHT, as in the paper).
        gate_lr: step size of the gates' plain gradient descent, in gate per (loss per gate); the paper's scripts use 5.
        dense_steps: with the other two schedules, steps at the start without projection, 0..select_steps - 1. A fresh
            LoRA has B = 0, so its first gate gradients are exactly zero (one step; two when the learning rate warms up
            from 0) and all gates tie: projecting then would keep the first sites, whatever the data.
        grow: WeightLoRA+: the survivors' rank grows by what the removed sites free. "served": to one rank that serving
            stacks take, on more than K sites where that leaves something; "paper": r n / K on K sites; see
            `select.ranks`. None: no growth.
        score: what sites are ranked by at T, see `select.scores`; any but "gate" needs "one-cut", because a projected
            gate hides what its site is worth.
        n_parameters: instead of `keep`: numbers in A and B that the sites that stay may have together; needs "one-cut".
        by: what stays or goes: whole sites, as in the paper; or directions of the sites, in a single cut at T. `keep`
            counts these.
        cost: instead of both, in words: what a step may cost, by which the caller chooses; needs "one-cut".
    """

    keep: int | None
    select_steps: int
    schedule: Schedule = "one-cut"
    gate_lr: float = 5.0
    dense_steps: int = 10
    grow: Growth | None = None
    score: str = "gate"
    n_parameters: int | None = None
    by: Unit = "site"
    cost: str | None = None

    def check(self, n_sites: int, total_steps: int, least_steps: int = 1) -> None:
        """Refuse settings that cannot work, before any work starts.

        Args:
            n_sites: n, LoRA sites of the model, or directions.
            total_steps: optimizer steps of the whole training; `select_steps` where only the selection is run.
            least_steps: that `select_steps` may be; 0 where the choice needs none.
        Raises:
            BudgetError: `keep` is not in 1..n_sites, or not exactly one budget is given.
            SettingsError: the warm-up does not fit, an unknown schedule or score, two that exclude each other, or a
                step size that is not positive.
        """
        if [self.keep, self.n_parameters, self.cost].count(None) != 2:
            raise BudgetError(
                f"keep={self.keep} sites and n_parameters={self.n_parameters}: one budget is needed. Pass one of them."
            )
        if self.keep is not None:
            check_keep(self.keep, n_sites, self.by)
        if self.n_parameters is not None:
            check_parameters(self.n_parameters)
        if self.schedule not in get_args(Schedule):
            raise SettingsError(f"schedule={self.schedule!r} is unknown. Pass one of {', '.join(get_args(Schedule))}.")
        if self.grow is not None and self.grow not in get_args(Growth):
            raise SettingsError(f"grow={self.grow!r} is unknown. Pass None, or one of {', '.join(get_args(Growth))}.")
        check_by(self.by, self.schedule, self.grow is not None)
        check_score(self.score, self.by)
        self.check_steps(total_steps, least_steps)
        if self.schedule != "one-cut" and (self.score != "gate" or self.keep is None):
            what = f"score={self.score!r}" if self.score != "gate" else self.cost or "a budget of parameters"
            raise SettingsError(
                f"schedule={self.schedule!r} drops sites by their gates, K of them, while it learns; {what} chooses at "
                f"the end. Pass schedule='one-cut'."
            )
        if not (math.isfinite(self.gate_lr) and self.gate_lr > 0):
            raise SettingsError(f"gate_lr={self.gate_lr} does not move a gate. Pass a positive number, such as 5.0.")

    def budget_at(self, step: int, n_sites: int) -> int:
        """Sites kept by the projection after `step` steps (counting the present one); "one-cut" does not project."""
        if self.schedule == "one-cut" or self.keep is None:
            return n_sites
        if self.schedule == "progressive":
            return progressive_budget(step, self.select_steps, n_sites, self.keep, self.dense_steps)
        return n_sites if step <= self.dense_steps else self.keep

    def choose(self, scores: Tensor, n_parameters_per_site: Sequence[int]) -> Tensor:
        """The sites that stay, by the scores of the finished warm-up.

        Args:
            scores: of `score`, (n_sites,); higher is more worth keeping.
            n_parameters_per_site: `Site.n_parameters` of every site.
        Returns:
            (n_sites,) bool.
        Raises:
            BudgetError: not one site fits into `n_parameters`.
        """
        if self.n_parameters is not None:
            return sites_for_parameters(scores, n_parameters_per_site, self.n_parameters)
        assert self.keep is not None  # by `check`; by `cost`, the caller chooses
        return sites_for_count(scores, self.keep)

    def ranks(
        self, scores: Tensor, is_kept: Tensor, is_open: Tensor, shapes: Sequence[Shape], one_rank: bool
    ) -> Tensor:
        """The rank of every site after the warm-up, 0 for those that go.

        Args:
            scores: as in `choose`.
            is_kept: what `choose` gave.
            is_open: (n_sites,) bool, the sites whose gate is not zero.
            shapes: of every site.
            one_rank: all that stay get one rank, also by "paper".
        """
        if self.grow == "served":
            return served_ranks(scores, is_kept, is_open, shapes)
        if self.grow == "paper":
            return paper_ranks(is_kept, shapes, one_rank)
        return torch.tensor([shape.rank for shape in shapes]) * is_kept.cpu()

    def check_steps(self, total_steps: int, least_steps: int = 1) -> None:
        """Raise SettingsError unless the warm-up fits into the training; see `check`."""
        dense_steps = 0 if self.schedule == "one-cut" else self.dense_steps
        for name, value in (("select_steps", self.select_steps), ("dense_steps", dense_steps)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise SettingsError(f"{name}={value!r} is not a whole number of steps.")
        if self.select_steps < least_steps:
            raise SettingsError(f"select_steps={self.select_steps} leaves no step to choose sites in. Pass 1 or more.")
        if self.schedule != "one-cut" and not 0 <= dense_steps < self.select_steps:
            raise SettingsError(
                f"dense_steps={dense_steps} steps without projection do not fit into select_steps={self.select_steps}. "
                f"Pass 0..{self.select_steps - 1}."
            )
        if self.select_steps > total_steps:
            raise SettingsError(
                f"select_steps={self.select_steps} is more than the {total_steps} steps of the training. "
                f"Pass at most {total_steps}, or train longer."
            )


def check_by(by: str, schedule: str, grows: bool) -> None:
    """Refuse what cannot be done with directions.

    Raises:
        SettingsError: unknown units, or what belongs to sites.
    """
    if by not in get_args(Unit):
        raise SettingsError(f"by={by!r} is unknown. Pass one of {', '.join(get_args(Unit))}.")
    if by == "site":
        return
    if schedule != "one-cut":
        raise SettingsError(
            f"schedule={schedule!r} drops sites by their gates while it learns; directions have no gates in training "
            "and are cut once, in the basis that the warm-up ends with. Pass schedule='one-cut', or by='site'."
        )
    if grows:
        raise SettingsError(
            "Directions that stay make the rank of a site lower, and WeightLoRA+ makes it higher. Leave growth out "
            "(--method weightlora), or pass by='site'."
        )


def check_same(settings: WeightLoraSettings, saved: Mapping[str, Any]) -> None:
    """Raise SettingsError unless the settings of the run to resume are the same."""
    for name, value in dataclasses.asdict(settings).items():
        before = saved.get(name)
        if before != value:
            raise SettingsError(f"{name}={value!r}, but the run to resume had {name}={before!r}. Pass the same.")


class Gates:
    """The gates of a warm-up: one learned multiplier per site.

        w <- H_k(w - eta * grad)       k: what the schedule keeps after this step

    A gate that is projected to zero still gets a gradient from its site's B A x and can come back, as in StoIHT.
    One step waits for the device once, whatever the number of sites.

    Attributes:
        values: w, (n_sites,) float32, all 1 at the start; a leaf that requires grad, changed in place by `step`.
        settings: the settings it was made with.
        n_steps: steps taken so far.
    """

    def __init__(
        self,
        n_sites: int,
        settings: WeightLoraSettings,
        device: torch.device | str = "cpu",
        projection: Projection = keep_largest,
    ) -> None:
        """Open all gates.

        Args:
            n_sites: n.
            settings: checked for `n_sites`.
            device: where the gates live.
            projection: H; the released code has another, which benchmarks/_published_weightlora.py transcribes.
        """
        self.settings = settings
        self.values = torch.ones(n_sites, dtype=torch.float32, device=device, requires_grad=True)
        self.n_steps = 0
        self._projection = projection
        self._n_changes = torch.zeros((), dtype=torch.int64, device=device)
        # filled on the device, so that keeping the gates of every step waits for nothing
        self._trajectory = torch.zeros(settings.select_steps, n_sites, device=device)

    @property
    def trajectory(self) -> Tensor:
        """The gates after each step so far, (n_steps, n_sites) float32."""
        return self._trajectory[: self.n_steps]

    @property
    def kept(self) -> Tensor:
        """(n_sites,) bool: the sites whose gate is not zero."""
        return self.values.detach() != 0

    @property
    def n_changes(self) -> int:
        """How often a site left the kept set or came back, over all sites and steps so far."""
        return int(self._n_changes)

    @property
    def is_finished(self) -> bool:
        """Whether the warm-up is over and only the sites to keep are left."""
        return self.n_steps >= self.settings.select_steps

    @torch.no_grad()
    def step(self, gradient: Tensor) -> None:
        """One step of gradient descent on the gates, then the projection that the schedule asks for.

        Args:
            gradient: d Loss / d w, shape (n_sites,), any float dtype and device. With several processes, average it
                over them first: every process then takes the same step.
        Raises:
            MeasureError: wrong shape, or a gate would become NaN or infinite; the gates are left as they were.
            SettingsError: the warm-up is over.
        """
        if self.is_finished:
            raise SettingsError(f"The warm-up of {self.settings.select_steps} steps is over; its gates are final.")
        if gradient.shape != self.values.shape:
            raise MeasureError(
                f"A gradient of shape {tuple(gradient.shape)} for {len(self.values)} gates. Pass one each."
            )
        gradient = gradient.to(self.values)
        moved = self.values - self.settings.gate_lr * gradient
        if not torch.isfinite(moved).all():
            site_index = int((~torch.isfinite(moved)).nonzero()[0])
            raise MeasureError(
                f"The gate of site {site_index} became {float(moved[site_index])} in warm-up step {self.n_steps + 1} "
                f"(gradient {float(gradient[site_index])}). Lower the learning rate or "
                f"gate_lr={self.settings.gate_lr}."
            )
        budget = self.settings.budget_at(self.n_steps + 1, len(self.values))
        kept_before = self.kept
        self.values.copy_(self._projection(moved, budget))
        self._n_changes += (self.kept != kept_before).sum()
        self._trajectory[self.n_steps] = self.values
        self.n_steps += 1

    @torch.no_grad()
    def keep_only(self, is_kept: Tensor) -> None:
        """Close all other gates, for good.

        Args:
            is_kept: (n_sites,) bool.
        """
        is_kept = is_kept.to(self.values.device)
        self._n_changes += (self.kept & ~is_kept).sum()
        self.values[~is_kept] = 0

    def state_dict(self) -> dict[str, Any]:
        """Everything a killed warm-up needs to go on: tensors, numbers and strings only."""
        return {
            "values": self.values.detach().clone(),
            "n_steps": self.n_steps,
            "n_changes": self.n_changes,
            "trajectory": self.trajectory.clone(),
            "settings": dataclasses.asdict(self.settings),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            SettingsError: the state is incomplete, or of other settings or another number of sites.
        """
        missing = sorted(self.state_dict().keys() - state.keys())
        if missing:
            raise SettingsError(f"The saved gates lack {missing[0]!r}. Resume from another checkpoint.")
        check_same(self.settings, state["settings"])
        if state["values"].shape != self.values.shape:
            raise SettingsError(
                f"The saved gates are {len(state['values'])}, but the model has {len(self.values)} LoRA sites. "
                f"Resume with the same target modules."
            )
        self.values.copy_(state["values"])
        self.n_steps = int(state["n_steps"])
        self.trajectory.copy_(state["trajectory"])
        self._n_changes.fill_(int(state["n_changes"]))
