"""What the last steps of a warm-up show of the directions of sites, from their own forward and backward passes.

z is what A puts out for a token, u = s B^T g the gradient of the loss with respect to it, in nats. For any basis T that
a site may get later, A' = T^-1 A and B' = B T:

    M_A = mean over t of z_t z_t^T,   M_B = sum_t u_t u_t^T / n       the balanced basis follows from these
    C_i = sum over the tokens t of row i of z_t u_t^T                 the slope of direction j's gate is (T^-1 C_i T)_jj
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from lorazor.adapter.gates import split_rows
from lorazor.adapter.sites import LiveSite
from lorazor.errors import MeasureError, RowsUnclearError, SettingsError
from lorazor.measure.gradients import MomentSums, observing, summed_over_processes
from lorazor.measure.sharding import this_process


class DirectionMoments:
    """Gathers M_A, M_B and, row by row, C of every site, from `attach_` to `detach_`.

    Attributes:
        sums: M_A and M_B so far.
        scale: what a gradient of the training's loss is multiplied by to be that of nats summed over answer tokens;
            None while nothing is to be gathered.
    """

    def __init__(self, sites: Sequence[LiveSite], has_rows: bool) -> None:
        """Begin with nothing seen.

        Args:
            sites: linear sites, all of which can be taken apart.
            has_rows: gather C, r r numbers for each row and site.
        """
        self.sums = MomentSums(sites)
        self.scale: float | None = None
        self._sites = list(sites)
        self._rows: dict[str, list[Tensor]] | None = {site.name: [] for site in sites} if has_rows else None
        self._n_rows = 0  # of the batch in the model
        self._undo: list[Callable[[], None]] = []

    def attach_(self, model: nn.Module) -> None:
        """Watch a model, and the sites in it."""
        name = getattr(model, "main_input_name", "input_ids")

        def count(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
            tensors = [kwargs.get(name), *args, *kwargs.values()]
            self._n_rows = next(len(one) for one in tensors if isinstance(one, Tensor) and one.ndim > 1)

        self._undo.append(model.register_forward_pre_hook(count, with_kwargs=True).remove)
        for site in self._sites:
            hook = observing(partial(self._receive, site))
            self._undo.append(site.module.lora_A[site.adapter].register_forward_hook(hook).remove)

    def detach_(self) -> None:
        """Leave the model alone."""
        while self._undo:
            self._undo.pop()()

    def begin_step(self, scale: Tensor | float | None) -> None:
        """Say what the passes of the step to come are multiplied by; None: they are not gathered."""
        self.scale = None if scale is None else float(scale)  # sites may be on several devices
        self.sums.n_tokens += self.scale or 0.0

    @torch.no_grad()
    def _receive(self, site: LiveSite, z: Tensor, u: Tensor) -> None:
        rows = None
        if self._rows is not None:
            try:  # in every step, so that the first one tells
                rows = split_rows(z, self._n_rows, site, copies=1)  # (rows, positions, r)
            except RowsUnclearError as error:
                raise SettingsError(
                    f"{error} The score 'fisher' needs to know it. Rank directions by 'balanced', or leave the site "
                    "out of target_modules."
                ) from error
        if self.scale is None:
            return
        u = u.float() * self.scale
        self.sums.add(site.name, z, u)
        if rows is not None and self._rows is not None:
            self._rows[site.name].append(rows.float().mT @ u.reshape(rows.shape))

    def slopes(self, name: str) -> Tensor:
        """C of every row that this process has seen, (rows, r, r) float64 on the CPU."""
        assert self._rows is not None
        return torch.cat([one.double().cpu() for one in self._rows[name]])

    def fisher(self, changes: Mapping[str, tuple[Tensor, Tensor] | None]) -> dict[str, Tensor]:
        """The Fisher information of the gates of directions in another basis.

            F_j = sum over rows i of ((T^-1 C_i T)_jj)^2 / n

        Args:
            changes: T^-1 and T, (r, r) float64, by site name; None of a site that was not seen.
        Returns:
            (r,) float64 by site name, in nats^2 per answer token; zeros where there is no change.
        Raises:
            MeasureError: a number is not finite.
        Source: Theis et al., arXiv:1801.05787, see `select.scoring.fisher`.
        """
        found = {}
        for site in self._sites:
            change = changes[site.name]
            found[site.name] = torch.zeros(site.rank, dtype=torch.float64)
            if change is not None and self._rows is not None and self._rows[site.name]:
                slopes = torch.einsum("jk,ikl,lj->ij", change[0], self.slopes(site.name), change[1])
                found[site.name] = slopes.square().sum(dim=0)
        n_tokens = torch.tensor([self.sums.n_tokens], dtype=torch.float64)
        flat = summed_over_processes(torch.cat([n_tokens, *found.values()]))
        if not torch.isfinite(flat).all():
            raise MeasureError("A gradient of the training is not a number. Lower the learning rate.")
        sizes = [len(one) for one in found.values()]
        return dict(zip(found, (flat[1:] / flat[0]).split(sizes), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """What was gathered by all processes; to be called in each of them."""
        rows: list[dict[str, list[Tensor]]] = []
        if self._rows is not None:
            here = [{name: [one.cpu() for one in own] for name, own in self._rows.items()}]
            rows = gather_object(here) if this_process().num_processes > 1 else here
        joined = {name: [one for part in rows for one in part[name]] for name in self._rows or ()}
        return {"sums": self.sums.flat(), "rows": joined}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state: the main process takes what all had.

        Raises:
            SettingsError: the state is of other sites, or of another score.
        """
        n_numbers = 1 + sum(map(len, self.sums.by_site.values()))
        if len(state["sums"]) != n_numbers or list(state["rows"]) != list(self._rows or ()):
            raise SettingsError("The saved warm-up is of other LoRA sites or of another score. Pass the same.")
        if not this_process().is_main_process:
            return
        self.sums.load_flat(state["sums"])
        if self._rows is not None:
            devices = {name: one.device for name, one in self.sums.by_site.items()}
            self._rows = {name: [one.to(devices[name]) for one in own] for name, own in state["rows"].items()}
