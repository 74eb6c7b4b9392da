"""Scores: how much each LoRA site is worth keeping, from what a warm-up showed.

Higher is more worth keeping; every score has shape (n_sites,). Scores over parameters are sums, not means, so that a
larger site can earn more: compare methods at equal parameters (`sites_for_parameters`), not only at equal K.

Learned: `gate_score`, `gate_norm_score`. Observed at no extra cost, by `WarmupObserver`: probe, sensitivity, credit.
Controls, which know nothing of the data: `random_score`, `first_layers_score`, `last_layers_score`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lorazor.adapter.sites import Site
from lorazor.errors import MeasureError, SettingsError

LEARNED = ("gate", "gate-norm")
OBSERVED = ("probe", "sensitivity", "credit")
CONTROLS = ("random", "first-layers", "last-layers")
SCORES = (*LEARNED, *OBSERVED, *CONTROLS)

# One entry per site: its A, B (and bias of B), as `site_parameters` lists them; a gradient may be None.
SiteTensors = Sequence[Sequence[Tensor]]
SiteGradients = Sequence[Sequence[Tensor | None]]


def gate_score(gates: Tensor) -> Tensor:
    """The size of the learned gate: |w_i|.

    Args:
        gates: w, (n_sites,), after the warm-up.
    Returns:
        (n_sites,), in gate.
    Source: Veprikov et al., arXiv:2506.02724, on magnitude.
    """
    return gates.detach().abs()


def gate_norm_score(
    gates: Tensor, A: Sequence[Tensor], B: Sequence[Tensor], scalings: Sequence[float] | Tensor
) -> Tensor:
    """The size of what a site adds to its weight: |w_i| s_i ||B_i A_i||_F.

    Args:
        gates: w, (n_sites,), after the warm-up.
        A: of every site, (r, d_in).
        B: of every site, (d_out, r).
        scalings: s, (n_sites,), without the gate.
    Returns:
        (n_sites,) float32 on the device of `gates`, in units of a weight.
    Source: ours; it ends the freedom to move size between w, A and B.
    """
    norms = torch.stack([product_norm(a, b).to(gates.device) for a, b in zip(A, B, strict=True)])
    return gate_score(gates).float() * torch.as_tensor(scalings, dtype=torch.float32, device=gates.device) * norms


@torch.no_grad()
def product_norm(A: Tensor, B: Tensor) -> Tensor:
    """||B A||_F without the (d_out, d_in) product: with B = Q R it is ||R A||_F.

    Args:
        A: (r, d_in), any float dtype.
        B: (d_out, r).
    Returns:
        () float32.
    """
    triangle = torch.linalg.qr(B.float(), mode="r").R  # (min(d_out, r), r)
    return torch.linalg.matrix_norm(triangle @ A.float())


@torch.no_grad()
def probe_of_step(B_gradients: Sequence[Tensor | None]) -> Tensor:
    """The gradient that the factor at zero receives: ||grad B_i||_1.

    With B = 0 the first non-zero gradient of gate i is -lr ||grad B_i||_1 (Adam's first step is lr sign(grad B_i)), so
    this, over the first batches, is what the published WeightLoRA code ranks sites by.

    Args:
        B_gradients: of every site, (d_out, r); None counts as zero. Of an embedding, pass A's: there A starts at zero.
    Returns:
        (n_sites,) float32, in loss per unit of B.
    Source: our reading of the code released with arXiv:2506.02724.
    """
    return _stacked([[_zero_if_none(g).float().abs().sum()] for g in B_gradients])


@torch.no_grad()
def sensitivity_of_step(parameters: SiteTensors, gradients: SiteGradients) -> Tensor:
    """What zeroing single weights would cost, to first order: sum over the site of |w grad w|.

    Args:
        parameters: of every site, before the optimizer step.
        gradients: of the loss, in the same order; None counts as zero.
    Returns:
        (n_sites,) float32, in loss.
    Source: Zhang et al., arXiv:2303.10512 (AdaLoRA).
    """
    return _stacked(
        [
            [
                (weight.float() * _zero_if_none(gradient).float()).abs().sum()
                for weight, gradient in zip(*site, strict=True)
            ]
            for site in zip(parameters, gradients, strict=True)
        ]
    )


@torch.no_grad()
def credit_of_step(before: SiteTensors, after: SiteTensors, gradients: SiteGradients) -> Tensor:
    """The loss decrease each site earned in one optimizer step, to first order.

        -( <grad A_i, Delta A_i> + <grad B_i, Delta B_i> )

    Summed over the steps of a warm-up this is the score `credit`. Moving size from B to A (c A and B / c, all along the
    path) changes none of its terms.

    Args:
        before: every site's parameters before the optimizer step.
        after: the same after it.
        gradients: of the loss at `before`; None counts as zero. Where gradients are clipped, the clipped ones weigh
            steps of large gradient less, the same for all sites.
    Returns:
        (n_sites,) float32, in loss; negative where a step made the loss worse.
    Source: ours; a path integral of the loss, as in Lan et al., arXiv:1909.01440 (loss change allocation).
    """
    return _stacked(
        [
            [
                (_zero_if_none(gradient).float() * (old.float() - new.float())).sum()
                for old, new, gradient in zip(*site, strict=True)
            ]
            for site in zip(before, after, gradients, strict=True)
        ]
    )


class WarmupObserver:
    """Running sums of the scores that one warm-up gives away: probe, sensitivity and credit.

        probe        sum over the first steps of ||grad B_i||_1
        sensitivity  m <- beta m + (1 - beta) sum |w grad w|
        credit       sum over all steps of -<grad, Delta>

    AdaLoRA smooths every weight and multiplies by an uncertainty; smoothing the sum of a site needs no memory.

    Attributes:
        n_probe_steps: steps that count for the probe, from the first.
        smoothing: beta, 0 <= beta < 1; AdaLoRA's default is 0.85.
        n_steps: steps seen so far.
    """

    def __init__(
        self,
        n_sites: int,
        n_probe_steps: int = 1,
        smoothing: float = 0.85,
        device: torch.device | str = "cpu",
    ) -> None:
        """Start with nothing seen.

        Raises:
            SettingsError: `n_probe_steps` is less than 1, or `smoothing` is outside 0 <= beta < 1.
        """
        if n_probe_steps < 1:
            raise SettingsError(f"n_probe_steps={n_probe_steps}. Pass 1 or more steps.")
        if not 0 <= smoothing < 1:
            raise SettingsError(f"smoothing={smoothing}. Pass 0 (none) or more, and less than 1.")
        self.n_probe_steps = n_probe_steps
        self.smoothing = smoothing
        self.n_steps = 0
        self._sums = {name: torch.zeros(n_sites, device=device) for name in ("probe", "sensitivity", "credit")}

    def add_step(self, before: SiteTensors, after: SiteTensors, gradients: SiteGradients) -> None:
        """Take in one optimizer step; nothing waits for the device.

        Args:
            before: A, B (and bias of B) of every site before the optimizer step.
            after: the same after it.
            gradients: of the loss at `before`, averaged over processes; None counts as zero.
        """
        sums = self._sums
        device = sums["credit"].device
        if self.n_steps < self.n_probe_steps:
            sums["probe"] += probe_of_step([site[1] for site in gradients]).to(device)
        seen = sensitivity_of_step(before, gradients).to(device)
        sums["sensitivity"].mul_(self.smoothing).add_(seen, alpha=1 - self.smoothing)
        sums["credit"] += credit_of_step(before, after, gradients).to(device)
        self.n_steps += 1

    def scores(self) -> dict[str, Tensor]:
        """Scores by name, (n_sites,) float32 each.

        Raises:
            MeasureError: no step was seen, or a score is not finite (which site).
        """
        if self.n_steps == 0:
            raise MeasureError("No step was seen, so no site has a score. Call add_step after each optimizer step.")
        for name, values in self._sums.items():
            if not torch.isfinite(values).all():
                site_index = int((~torch.isfinite(values)).nonzero()[0])
                raise MeasureError(
                    f"{name} of site {site_index} is {float(values[site_index])} after {self.n_steps} steps. "
                    f"Lower the learning rate, or check the data for examples whose loss is not a number."
                )
        return {name: values.clone() for name, values in self._sums.items()}

    def state_dict(self) -> dict[str, Any]:
        """Everything a killed warm-up needs to go on: tensors, numbers and strings only."""
        return {
            "sums": {name: values.clone() for name, values in self._sums.items()},
            "n_steps": self.n_steps,
            "n_probe_steps": self.n_probe_steps,
            "smoothing": self.smoothing,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            SettingsError: the state is incomplete, or of other settings or another number of sites.
        """
        missing = sorted({"sums", "n_steps", "n_probe_steps", "smoothing"} - set(state))
        missing += sorted(set(self._sums) - set(state.get("sums", {})))
        if missing:
            raise SettingsError(f"The saved scores lack {missing[0]!r}. Resume from another checkpoint.")
        for name in ("n_probe_steps", "smoothing"):
            if state[name] != getattr(self, name):
                raise SettingsError(
                    f"{name}={getattr(self, name)}, but the run to resume had {name}={state[name]}. Pass the same."
                )
        for name, values in self._sums.items():
            if state["sums"][name].shape != values.shape:
                raise SettingsError(
                    f"The saved scores are of {len(state['sums'][name])} sites, but the model has {len(values)}. "
                    f"Resume with the same target modules."
                )
        for name, values in self._sums.items():
            values.copy_(state["sums"][name])
        self.n_steps = int(state["n_steps"])


def control_scores(sites: Sequence[Site], seed: int) -> dict[str, Tensor]:
    """All scores that know nothing of the data, by name, (n_sites,) float32 each.

    They are places in an order, from 1, and no amounts: no site is worth nothing by them, and none is divided by the
    size of a site.

    Args:
        sites: in the order of `in_order`, which is that of `find_sites` and of `read_adapter`.
        seed: of the score "random".
    """
    return {
        "random": random_score(len(sites), seed),
        "first-layers": first_layers_score(sites),
        "last-layers": last_layers_score(sites),
    }


def random_score(n_sites: int, seed: int) -> Tensor:
    """Control: a uniformly random order of the sites, so that the highest K are a uniformly random set.

    Args:
        n_sites: n.
        seed: of the order.
    Returns:
        (n_sites,) float32, a permutation of 1..n.
    """
    return 1.0 + torch.randperm(n_sites, generator=torch.Generator().manual_seed(seed))


def first_layers_score(sites: Sequence[Site]) -> Tensor:
    """Control: lower layers first; within a layer, sites tie.

    Args:
        sites: in the order of `in_order`; all stacks count as one, sites outside them come last.
    Returns:
        (n_sites,) float32, how many layers there are from this one on.
    """
    depths = _depths(sites)
    return (depths.max() - depths + 1).float()


def last_layers_score(sites: Sequence[Site]) -> Tensor:
    """Control: upper layers first; within a layer, sites tie. See `first_layers_score`."""
    return _depths(sites).float() + 1


def _depths(sites: Sequence[Site]) -> Tensor:
    """(n_sites,) place of each site's layer among all layers, as they run; outside stacks each site is a layer."""
    places: dict[tuple[str | None, int | str], int] = {}
    for site in sites:
        places.setdefault(_layer_of(site), len(places))
    return torch.tensor([places[_layer_of(site)] for site in sites])


def _layer_of(site: Site) -> tuple[str | None, int | str]:
    return site.stack, site.name if site.layer is None else site.layer


def _zero_if_none(gradient: Tensor | None) -> Tensor:
    return torch.zeros(()) if gradient is None else gradient.detach()


def _stacked(terms: Sequence[Sequence[Tensor]]) -> Tensor:
    """(n_sites,) sums of each site's terms, on the first site's device (sites may be spread over devices)."""
    sums = [torch.stack(list(site)).sum() for site in terms]
    return torch.stack([value.to(sums[0].device) for value in sums])
