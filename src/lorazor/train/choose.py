"""A selection run: its settings, from what a user asks for, and the callback that ends it with the choice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import TrainerControl, TrainerState, TrainingArguments

from lorazor.adapter.sites import LiveSite
from lorazor.errors import BudgetError, SettingsError
from lorazor.fields import n_bytes
from lorazor.select.projection import budget_for_fraction, check_keep, check_parameters
from lorazor.select.scores import CONTROLS, control_scores
from lorazor.select.weightlora import WeightLoraSettings
from lorazor.selection import Selection
from lorazor.settings import BudgetSettings, ChoosingSettings, FitSettings
from lorazor.train.evidence import Evidence, ranks_by, score_rows, selection_of
from lorazor.train.warmup import Warmup, check_fits, n_choices

SHARE_OF_SITES, SHARE_OF_DIRECTIONS = 1 / 3, 4 / 5
"""Of a training, the steps before the choice. Without the sites that go a step costs less, so they go early; directions
that go save no time, and a late choice of them ends lower (docs/LOG.md)."""


def check_budget(budget: BudgetSettings, by: str) -> None:
    """Refuse none or several of the budgets, before anything is loaded.

    Raises:
        BudgetError: not exactly one, or one that is out of any range.
    """
    given = {name: value for name, value in vars(budget).items() if value is not None}
    if len(given) != 1:
        what = "None" if not given else " and ".join(f"{name}={value}" for name, value in given.items())
        raise BudgetError(
            f"{what} given as the budget. Pass one of --params N, --params-fraction F, --keep K ({by}s), "
            f"--keep-fraction F (of the {by}s), --step-time F or --memory SIZE."
        )
    if budget.keep is not None:
        check_keep(budget.keep, unit=by)
    if budget.params is not None:
        check_parameters(budget.params)
    for name, what in (("keep_fraction", f"{by}s"), ("params_fraction", "parameters of LoRA on all sites")):
        if (share := getattr(budget, name)) is not None and not 0 < share <= 1:
            raise BudgetError(f"{name}={share} of the {what}. Pass more than 0 and at most 1.")
    CostLimit.of(budget)


def check_limit(budget: BudgetSettings, choosing: ChoosingSettings, grow: bool) -> None:
    """Refuse what does not go with a limit on the cost of a step, before anything is loaded.

    Raises:
        SettingsError: another schedule than one-cut, growth, or directions.
    """
    limit = CostLimit.of(budget)
    if limit is not None and choosing.by == "direction":
        raise SettingsError(
            f"{limit} is a matter of sites: at a lower rank a site costs hardly less. Pass --by site, or --params N."
        )
    if limit is not None and choosing.schedule != "one-cut":
        raise SettingsError(
            f"schedule={choosing.schedule!r} drops sites by their number while it learns, and cannot meet {limit}. "
            "Pass --schedule one-cut, or --keep K."
        )
    if limit is not None and grow:
        raise SettingsError(
            f"{limit} is the cost of sites at the rank that they have, which WeightLoRA+ raises. Pass --keep K or "
            "--params N, or choose without growth."
        )


@dataclass(frozen=True)
class CostLimit:
    """What a training step may cost.

    Attributes:
        name: of the setting, `step_time` or `memory`.
        value: as it was given.
        share: of the cost of LoRA on all sites; None where bytes were given.
        n_bytes: of the peak of memory; None where a share was given.
    """

    name: Literal["step_time", "memory"]
    value: float | str
    share: float | None = None
    n_bytes: int | None = None

    def __str__(self) -> str:
        return f"{self.name}={self.value}"

    @classmethod
    def of(cls, budget: BudgetSettings) -> CostLimit | None:
        """The limit that is the budget, if one is.

        Raises:
            BudgetError: it is out of any range.
        """
        if budget.step_time is not None:
            if not 0 < budget.step_time < 1:
                raise BudgetError(
                    f"step_time={budget.step_time} of the time of LoRA on all sites. Pass more than 0 and less than 1."
                )
            return cls("step_time", budget.step_time, share=budget.step_time)
        if budget.memory is None:
            return None
        share = room = None
        try:
            share = float(budget.memory)
        except ValueError:
            room = n_bytes(budget.memory)
        if not (room or (share is not None and 0 < share < 1)):
            raise BudgetError(
                f"memory={budget.memory!r} is no size. Pass one with its unit, such as 12GB or 900MiB; or a share of "
                "the peak of LoRA on all sites, more than 0 and less than 1."
            )
        return cls("memory", budget.memory, share, room)


def steps_of_selection(choosing: ChoosingSettings, training: FitSettings) -> int:
    """T, optimizer steps of the selection run: the ones asked for, or a share of the training that suits what is kept.

    Scores that look at no data need none: the choice is made before the first step, unless steps were asked for.

    Raises:
        SettingsError: they do not fit into the training, or end while the learning rate still rises.
    """
    is_by_place = choosing.by == "site" and choosing.score in CONTROLS
    if is_by_place and choosing.select_steps is None and choosing.schedule == "one-cut":
        return 0
    share = SHARE_OF_DIRECTIONS if choosing.by == "direction" else SHARE_OF_SITES
    steps = max(1, int(share * training.steps)) if choosing.select_steps is None else choosing.select_steps
    if not 1 <= steps < training.steps:
        raise SettingsError(
            f"select_steps={steps} of steps={training.steps}: the selection run is the first part of the training. "
            + (f"Pass 1..{training.steps - 1}." if training.steps > 1 else "Pass more steps.")
        )
    if steps < training.rise_steps:
        raise SettingsError(
            f"select_steps={steps} end while the learning rate rises, in rise_steps={training.rise_steps}. "
            f"Pass select_steps of at least {training.rise_steps}, or a shorter rise."
        )
    return steps


def warmup_settings(
    sites: Sequence[LiveSite], budget: BudgetSettings, choosing: ChoosingSettings, training: FitSettings, grow: bool
) -> WeightLoraSettings:
    """The settings of a selection run, checked for the model.

    Args:
        sites: all sites of the model.
        budget: exactly one of its fields.
        choosing: how sites are chosen.
        training: of the whole training.
        grow: WeightLoRA+.
    Raises:
        BudgetError: the budget does not fit the sites.
        SettingsError: settings that contradict each other.
    """
    by, score = choosing.by, choosing.score
    assert by is not None and score is not None  # the workflow has said them
    n_parts, keep, n_parameters = n_choices(sites, by), budget.keep, budget.params
    if budget.keep_fraction is not None:
        keep = budget_for_fraction(budget.keep_fraction, n_parts)
    if budget.params_fraction is not None:
        n_all = sum(site.n_parameters for site in sites)
        if (n_parameters := int(budget.params_fraction * n_all)) < 1:
            raise BudgetError(f"params_fraction={budget.params_fraction} of {n_all:,} parameters is none. Pass more.")
    settings = WeightLoraSettings(
        keep,
        steps_of_selection(choosing, training),
        choosing.schedule,
        choosing.gate_lr,
        choosing.dense_steps,
        choosing.growth if grow else None,
        score,
        n_parameters,
        by,
        None if (limit := CostLimit.of(budget)) is None else str(limit),
    )
    settings.check(n_parts, training.steps, least_steps=0 if settings.score in CONTROLS else 1)
    check_fits(settings, sites)
    return settings


def choose_without_steps(
    sites: Sequence[LiveSite],
    settings: WeightLoraSettings,
    seed: int,
    spend: Callable[[Tensor], Tensor] | None,
) -> tuple[Selection, list[dict[str, Any]]]:
    """Choose by a score that looks at no data, before any training.

    Args:
        sites: all sites.
        settings: with such a score.
        seed: of the score "random".
        spend: see `ChooseSites`.
    Returns:
        The choice, and what to write beside it: every such score of every site.
    """
    scores = control_scores(sites, seed)
    ranks = ranks_by(scores[settings.score], sites, settings, spend, torch.ones(len(sites), dtype=torch.bool), True)
    kept = {site.name: rank for site, rank in zip(sites, ranks, strict=True) if rank}
    chosen = selection_of(sites, scores[settings.score], kept, settings, {"seed": seed})
    return chosen, score_rows(sites, scores)


class ChooseSites(Warmup):
    """Choose sites in `settings.select_steps` steps, then end the training: a selection run.

    Nothing of the model changes but the numbers in A and B, so that any way of training that can run LoRA can run it;
    the survivors are trained by a second, ordinary run. The Trainer's `max_steps` may be that of the whole training, so
    that its learning rate is the whole training's.
    """

    has_one_rank = True

    def __init__(
        self, settings: WeightLoraSettings, seed: int, spend: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        """Note the settings.

        Args:
            settings: of the selection run.
            seed: see `Warmup`.
            spend: the sites to keep, (n_sites,) bool, by their scores; where `settings.cost` is the budget.
        """
        super().__init__(settings, seed)
        self.spend = spend

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin the warm-up. The learning rate is planned; what counts steps from here on counts its own."""
        super().on_train_begin(args, state, control, **kwargs)
        state.max_steps = self.settings.select_steps

    def finish(self, evidence: Evidence, state: TrainerState, control: TrainerControl, **kwargs: Any) -> list[LiveSite]:
        """Stop; there is no checkpoint of this step to go on from.

        Everything stays in the model: what is saved then can be cut by this choice or another.
        """
        control.should_training_stop = True
        control.should_save = control.should_evaluate = False
        return evidence.settle_()
