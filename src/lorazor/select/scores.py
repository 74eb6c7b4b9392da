"""Scores: how much each LoRA site is worth keeping, from what a warm-up showed.

Higher is more worth keeping; every score has shape (n_sites,). Scores over parameters are sums, not means, so that a
larger site can earn more: compare methods at equal parameters (`sites_for_parameters`), not only at equal K.

Learned, `learned_scores`: gate, gate-norm. Observed at no cost, `WarmupObserver`: probe, sensitivity, loss-change.
Controls, which know nothing of the data, `control_scores`: random, first-layers, last-layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lorazor.adapter.sites import Site
from lorazor.errors import MeasureError, SettingsError

OBSERVED = ("probe", "sensitivity", "loss-change")
CONTROLS = ("random", "first-layers", "last-layers")
SCORES = ("gate", "gate-norm", *OBSERVED, *CONTROLS)
DIRECTION_SCORES = ("fisher", "balanced", "energy", "random")
"""Of directions, see `select.scoring`; here from what the steps of a training show."""

# One entry per site: its A, B (and bias of B), as `site_parameters` lists them; a gradient may be None.
SiteTensors = Sequence[Sequence[Tensor]]
SiteGradients = Sequence[Sequence[Tensor | None]]


def default_warmup_score(by: str, limit: str | None = None) -> str:
    """What sites or directions are ranked by where nothing else is asked for.

    Args:
        by: "site" or "direction".
        limit: where the cost of a step is limited, what is: "step_time" or "memory". No score that looks at data was
            better there, see docs/decisions/0037-a-limit-on-a-step-needs-no-evidence.md.
    """
    if by == "direction":
        return "fisher"
    return {None: "gate", "step_time": "last-layers", "memory": "random"}[limit]


def check_score(name: str, by: str = "site") -> None:
    """Refuse a name that is none of `SCORES`, or of `DIRECTION_SCORES`.

    Raises:
        SettingsError: unknown, of the other unit, or the name that a score had before.
    """
    if by == "site" and name == "credit":
        raise SettingsError(
            "score='credit': what a warm-up knows is called 'loss-change' now; credit is another formula, of "
            "'lorazor shrink'. Pass score='loss-change'."
        )
    own, others = (DIRECTION_SCORES, SCORES) if by == "direction" else (SCORES, DIRECTION_SCORES)
    if name in own:
        return
    if name in others:
        raise SettingsError(f"score={name!r} does not rank by {by}. Pass one of {', '.join(own)}.")
    raise SettingsError(f"score={name!r} is unknown. Pass one of {', '.join(own)}.")


@torch.no_grad()
def learned_scores(
    gates: Tensor, A: Sequence[Tensor], B: Sequence[Tensor], scalings: Sequence[float]
) -> dict[str, Tensor]:
    """The size of the learned gates, and of what a site adds to its weight, by name.

        gate        |w_i|
        gate-norm   |w_i| s_i ||B_i A_i||_F

    Args:
        gates: w, (n_sites,), after the warm-up.
        A: of every site, (r, d_in), any float dtype.
        B: of every site, (d_out, r).
        scalings: s, (n_sites,), without the gate.
    Returns:
        (n_sites,) each on the device of `gates`, in gate, and float32 in units of a weight.
    Source: `gate`: Veprikov et al., arXiv:2506.02724, on magnitude. `gate-norm`: ours; it ends the freedom to move size
        between w, A and B.
    """
    norms = []
    for a, b in zip(A, B, strict=True):
        triangle = torch.linalg.qr(b.float(), mode="r").R  # B = Q R, ||B A|| = ||R A||: no (d_out, d_in) product
        norms.append(torch.linalg.matrix_norm(triangle @ a.float()).to(gates.device))
    scale = torch.as_tensor(scalings, dtype=torch.float32, device=gates.device)
    return {"gate": gates.abs(), "gate-norm": gates.abs().float() * scale * torch.stack(norms)}


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
    return _summed(Tensor.abs, [[gradient] for gradient in B_gradients])


def sensitivity_of_step(parameters: SiteTensors, gradients: SiteGradients) -> Tensor:
    """What zeroing single weights would cost, to first order: sum over the site of |w grad w|.

    Args:
        parameters: of every site, before the optimizer step.
        gradients: of the loss, in the same order; None counts as zero.
    Returns:
        (n_sites,) float32, in loss.
    Source: Zhang et al., arXiv:2303.10512 (AdaLoRA).
    """
    return _summed(lambda weight, gradient: (weight * gradient).abs(), parameters, gradients)


def loss_change_of_step(before: SiteTensors, after: SiteTensors, gradients: SiteGradients) -> Tensor:
    """The loss decrease each site earned in one optimizer step, to first order.

        -( <grad A_i, Delta A_i> + <grad B_i, Delta B_i> )

    Summed over the steps of a warm-up this is the score `loss-change`. Moving size from B to A (c A and B / c, all
    along the path) changes none of its terms.

    Args:
        before: every site's parameters before the optimizer step.
        after: the same after it.
        gradients: of the loss at `before`; None counts as zero. Where gradients are clipped, the clipped ones weigh
            steps of large gradient less, the same for all sites.
    Returns:
        (n_sites,) float32, in loss; negative where a step made the loss worse.
    Source: ours; a path integral of the loss, as in Lan et al., arXiv:1909.01440 (loss change allocation).
    """
    return _summed(lambda old, new, gradient: gradient * (old - new), before, after, gradients)


class WarmupObserver:
    """Running sums of the scores that one warm-up gives away: probe, sensitivity and loss-change.

        probe        sum over the first steps of ||grad B_i||_1
        sensitivity  m <- beta m + (1 - beta) sum |w grad w|
        loss-change  sum over all steps of -<grad, Delta>

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
        self._sums = {name: torch.zeros(n_sites, device=device) for name in OBSERVED}

    def add_step(self, before: SiteTensors, after: SiteTensors, gradients: SiteGradients) -> None:
        """Take in one optimizer step; nothing waits for the device.

        Args:
            before: A, B (and bias of B) of every site before the optimizer step.
            after: the same after it.
            gradients: of the loss at `before`, averaged over processes; None counts as zero.
        """
        sums = self._sums
        device = sums["loss-change"].device
        if self.n_steps < self.n_probe_steps:
            sums["probe"] += probe_of_step([site[1] for site in gradients]).to(device)
        seen = sensitivity_of_step(before, gradients).to(device)
        sums["sensitivity"].mul_(self.smoothing).add_(seen, alpha=1 - self.smoothing)
        sums["loss-change"] += loss_change_of_step(before, after, gradients).to(device)
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

        random         a uniformly random order of the sites, so that the highest K are a uniformly random set
        first-layers   lower layers first; within a layer, sites tie
        last-layers    upper layers first; within a layer, sites tie

    They are places in an order, from 1, and no amounts: no site is worth nothing by them, and none is divided by the
    size of a site. All stacks count as one, and outside them each site is a layer.

    Args:
        sites: in the order of `in_order`, which is that of `find_sites` and of `read_adapter`: sites outside the
            stacks come last.
        seed: of the score "random".
    """
    layers = [(site.stack, site.name if site.layer is None else site.layer) for site in sites]
    places = {layer: place for place, layer in enumerate(dict.fromkeys(layers), start=1)}
    depths = torch.tensor([places[layer] for layer in layers], dtype=torch.float32)
    order = torch.randperm(len(sites), generator=torch.Generator().manual_seed(seed))
    return {"random": 1.0 + order, "first-layers": len(places) + 1 - depths, "last-layers": depths}


@torch.no_grad()
def _summed(term: Callable[..., Tensor], *sites: SiteGradients) -> Tensor:
    """(n_sites,) sums of a term over each site's tensors in float32, on the first site's device; None is zero."""
    sums = []
    for site in zip(*sites, strict=True):
        rows = [
            [torch.zeros(()) if one is None else one.detach().float() for one in row] for row in zip(*site, strict=True)
        ]
        sums.append(torch.stack([term(*row).sum() for row in rows]).sum())
    return torch.stack([value.to(sums[0].device) for value in sums])
