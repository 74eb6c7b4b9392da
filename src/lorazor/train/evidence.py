"""What a warm-up learns of the parts of an adapter, and what becomes of the model by it.

`SiteEvidence`, whole sites by learned gates, is here; `DirectionEvidence` in `direction_evidence`.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import reduce
from torch import Tensor, nn

from lorazor.adapter.sites import LiveSite, site_parameters
from lorazor.errors import MeasureError
from lorazor.runs import versions
from lorazor.select.scores import CONTROLS, WarmupObserver, control_scores, learned_scores
from lorazor.select.weightlora import Gates, WeightLoraSettings
from lorazor.selection import Selection
from lorazor.train.disconnect import disconnect_, grow_, shapes_of
from lorazor.train.gating import GatedSites
from lorazor.train.optimizers import rescale_state_

SCORES_FILE = "scores.jsonl"
GATES_FILE = "gates.jsonl"
_N_PROBE_STEPS = 2  # what the published code's choice rests on


class Evidence(ABC):
    """What steps show, from `attach_` to either `settle_` or `cut_`, or to `fold_` where nothing was chosen.

    Attributes:
        sites: all sites of the adapter.
        settings: of the warm-up.
        seed: of the score "random", and of new directions where ranks grow.
        n_steps: steps of the warm-up that were seen.
    """

    def __init__(self, sites: Sequence[LiveSite], settings: WeightLoraSettings, seed: int) -> None:
        """Begin with nothing seen; the model stays as it is."""
        self.sites, self.settings, self.seed, self.n_steps = list(sites), settings, seed, 0

    @property
    def is_finished(self) -> bool:
        """Whether the warm-up is over."""
        return self.n_steps >= self.settings.select_steps

    @abstractmethod
    def attach_(self, model: nn.Module) -> None:
        """Watch the model."""

    def begin_step(self, n_items: Tensor | float) -> None:
        """Before the passes of a step, with the answer tokens of a process by which their losses are divided."""
        return

    @abstractmethod
    def before_step(self) -> None:
        """Between the backward passes of a step and the optimizer."""

    def after_step(self) -> None:
        """After the optimizer has taken its step."""
        return

    @abstractmethod
    def choose(self, has_one_rank: bool) -> list[int]:
        """Choose, once the warm-up is over.

        Args:
            has_one_rank: all sites that stay get one rank, where ranks grow.
        Returns:
            The rank of every site from here on, 0 for those that go.
        """

    @abstractmethod
    def settle_(self) -> list[LiveSite]:
        """End, with all parts still in the model, which can be cut by the choice or another. The chosen sites."""

    @abstractmethod
    def cut_(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[LiveSite]:
        """End, and take what was not chosen out of model and optimizer. The chosen sites, as they are then."""

    @abstractmethod
    def fold_(self) -> None:
        """Leave the model as an ordinary one with all parts, which computes what it computed."""

    @abstractmethod
    def selection(self, survivors: Sequence[LiveSite]) -> Selection:
        """The choice, over all sites, with the ranks that the survivors have now."""

    @abstractmethod
    def rows(self) -> dict[str, list[dict[str, Any]]]:
        """What to write beside the choice, by the name of the file."""

    def log(self) -> dict[str, float]:
        """What to add to the Trainer's log."""
        return {}

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint lacks to go on with the warm-up; to be called in all processes."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state, before `attach_`.

        Raises:
            SettingsError: it is of another run.
        """


class SiteEvidence(Evidence):
    """Gates on the sites, their update, and what each site earned meanwhile.

    Attributes:
        gated: the sites with their gates.
    """

    def __init__(
        self,
        sites: Sequence[LiveSite],
        settings: WeightLoraSettings,
        seed: int,
        spend: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Open all gates.

        Args:
            sites: all sites.
            settings: of the warm-up.
            seed: see `Evidence`.
            spend: the sites to keep, (n_sites,) bool, by their scores; where `settings.cost` is the budget.
        """
        super().__init__(sites, settings, seed)
        self._spend = spend
        device = site_parameters(sites[0].module, sites[0].adapter)[0].device
        self.gated = GatedSites(sites, Gates(len(sites), settings, device))
        self._observer = WarmupObserver(len(sites), min(_N_PROBE_STEPS, settings.select_steps), device=device)
        self._before: list[list[Tensor]] = []  # A and B in front of the optimizer's step
        self._ranks: list[int] = []
        self._scores: dict[str, Tensor] = {}
        self._trajectory: list[list[float]] = []

    def attach_(self, model: nn.Module) -> None:
        """Put the gates on the sites."""
        self.gated.attach_()

    def before_step(self) -> None:
        """Take a step on the gates, from the same backward passes.

        The gates are no parameters of the model, so clipping has neither counted nor changed their gradient.

        Raises:
            MeasureError: a gate would become NaN or infinite (which site), or no gate got a gradient.
        """
        gates = self.gated.gates
        gradient: Any = reduce(self.gated.take_gradient(), "mean")  # over all processes, as DDP does with parameters
        try:
            gates.step(gradient)
        except MeasureError as error:
            moved = gates.values.detach() - gates.settings.gate_lr * gradient
            site = self.sites[int((~torch.isfinite(moved)).nonzero()[0])]
            raise MeasureError(f"{site.name}: {error}") from error
        self.n_steps = gates.n_steps
        self.gated.update_()
        self._before = [[factor.detach().clone() for factor in _factors(site)] for site in self.sites]

    def after_step(self) -> None:
        """Note what each site earned in the step that the optimizer has just taken."""
        factors = [_factors(site) for site in self.sites]
        self._observer.add_step(
            self._before,
            [[factor.detach() for factor in site] for site in factors],
            [[factor.grad for factor in site] for site in factors],
        )
        self._before = []

    def choose(self, has_one_rank: bool) -> list[int]:
        """By the score that the settings name."""
        settings, gates = self.settings, self.gated.gates
        pairs = [site_parameters(site.module, site.adapter)[:2] for site in self.sites]
        A, B = ([pair[place].detach().flatten(1) for pair in pairs] for place in (0, 1))  # convolutions too
        learned = learned_scores(gates.values, A, B, [site.scaling for site in self.sites])
        by_name = {**learned, **self._observer.scores(), **control_scores(self.sites, self.seed)}
        self._scores = {name: values.float().cpu() for name, values in by_name.items()}
        self._trajectory = gates.trajectory.tolist()
        ranked = self._scores[settings.score]
        is_learned = settings.score not in CONTROLS
        if is_learned and len(ranked) > 1 and bool((ranked == ranked[0]).all()):
            raise MeasureError(
                f"The warm-up of {self.n_steps} steps showed nothing: {settings.score} is {float(ranked[0]):g} for all "
                f"{len(ranked)} sites. B starts at 0 and the learning rate too, so the first two steps show nothing, "
                "nor do examples without answers. Pass more select_steps."
            )
        self._ranks = ranks_by(ranked, self.sites, settings, self._spend, gates.kept.cpu(), has_one_rank)
        return self._ranks

    def settle_(self) -> list[LiveSite]:
        """Multiply the gates into B as they were learned, on all sites."""
        self.gated.fold_()
        self.gated.gates.keep_only(torch.tensor(self._ranks) > 0)
        return [site for site, rank in zip(self.sites, self._ranks, strict=True) if rank]

    def cut_(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[LiveSite]:
        """Fold the gates, take the dropped sites out of model and optimizer, let the survivors grow."""
        is_kept = [rank > 0 for rank in self._ranks]
        self.gated.gates.keep_only(torch.tensor(is_kept))
        gates = self.gated.fold_()
        for site, gate in zip(self.sites, gates, strict=True):
            for parameter in site_parameters(site.module, site.adapter)[1:]:
                rescale_state_(optimizer, parameter, gate)
        survivors = disconnect_(model, self.sites, is_kept, optimizer)
        if self.settings.grow:
            generator = torch.Generator().manual_seed(self.seed)
            survivors = grow_(model, survivors, [rank for rank in self._ranks if rank], generator, optimizer)
        return survivors

    def fold_(self) -> None:
        """Multiply the gates into B."""
        self.gated.fold_()

    def selection(self, survivors: Sequence[LiveSite]) -> Selection:
        """All sites, each with its score; the survivors stay. Weights are 1: gates are folded."""
        ranks = {site.name: site.rank for site in survivors}
        provenance = {"seed": self.seed, "n_changes": self.gated.gates.n_changes}
        return selection_of(self.sites, self._scores[self.settings.score], ranks, self.settings, provenance)

    def rows(self) -> dict[str, list[dict[str, Any]]]:
        """Every score of every site, and the gates after every step."""
        steps = [{"step": step, "gates": values} for step, values in enumerate(self._trajectory, start=1)]
        return {SCORES_FILE: score_rows(self.sites, self._scores), GATES_FILE: steps}

    def log(self) -> dict[str, float]:
        """The gates, as far as they are not 0."""
        values = self.gated.gates.values.detach()
        kept = values[values != 0]
        return {
            "lorazor/gates_kept": len(kept),
            "lorazor/gate_min": float(kept.min()),
            "lorazor/gate_max": float(kept.max()),
            "lorazor/changes": self.gated.gates.n_changes,
        }

    def state_dict(self) -> dict[str, Any]:
        """The gates, the plain B, and what was observed."""
        return {**self.gated.state_dict(), "observer": self._observer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with these gates."""
        self.gated.load_state_dict(state)
        self._observer.load_state_dict(state["observer"])
        self.n_steps = self.gated.gates.n_steps


def ranks_by(
    scores: Tensor,
    sites: Sequence[LiveSite],
    settings: WeightLoraSettings,
    spend: Callable[[Tensor], Tensor] | None,
    is_open: Tensor,
    has_one_rank: bool,
) -> list[int]:
    """The rank of every site by its score, 0 for those that go; see `SiteEvidence` and `WeightLoraSettings.ranks`."""
    is_kept = settings.choose(scores, [site.n_parameters for site in sites]) if spend is None else spend(scores)
    return settings.ranks(scores, is_kept, is_open, shapes_of(sites), has_one_rank).tolist()


def score_rows(sites: Sequence[LiveSite], scores: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """What every site is, and its scores by name, each (n_sites,)."""
    return [
        site.to_row() | {name: float(values[index]) for name, values in scores.items()}
        for index, site in enumerate(sites)
    ]


def selection_of(
    sites: Sequence[LiveSite],
    scores: Tensor,
    ranks: Mapping[str, int],
    settings: WeightLoraSettings,
    provenance: Mapping[str, Any],
) -> Selection:
    """A choice over all sites, each with its score.

    Args:
        sites: all sites.
        scores: (n_sites,), that they were ranked by.
        ranks: of those that stay, by name.
        settings: by which they were chosen.
        provenance: to add to the versions.
    """
    entries = [
        dataclasses.replace(one.entry(one.name in ranks, score=score), rank=ranks.get(one.name, one.rank))
        for one, score in zip(sites, scores.tolist(), strict=True)
    ]
    method = "weightlora+" if settings.grow else "weightlora"
    return Selection(tuple(entries), method, dataclasses.asdict(settings), {**provenance, "versions": versions()})


def _factors(site: LiveSite) -> list[nn.Parameter]:
    """The factor that starts at random, then the one that starts at zero (and its bias)."""
    parameters = site_parameters(site.module, site.adapter)
    is_embedding = site.adapter in site.module.lora_embedding_A  # there A starts at zero
    return parameters[::-1] if is_embedding else parameters
