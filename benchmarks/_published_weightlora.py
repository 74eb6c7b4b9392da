"""WeightLoRA as it was published, transcribed: the competitor of benchmarks and the oracle of a test.

    h = W x + (omega_i s A_i B_i)^T x      the dense product is made anew in every forward pass
    A, B    take a step of AdamW
    omega   <- omega - eta grad_omega      from the same backward pass, then all but the K largest *signed* ones are 0

Only torch is imported: none of the code that it is compared with. Two things are not as released, because they would
make the comparison say nothing: A and B begin where the other side's do (the release draws A larger), and equal gates
keep the earlier site (the release leaves the order of ties to torch.topk).

Source: Veprikov et al., arXiv:2506.02724, and our reading of the code released with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

GATE_LEARNING_RATE = 5.0
"""eta of the released scripts, in gate per (loss per gate)."""


def keep_largest_signed(gates: Tensor, budget: int) -> Tensor:
    """Zero all but the `budget` gates of largest signed value, as the released code does; equal gates keep the earlier.

    It is not the projection of the published equation: of (-3, .5, .2, -.1, 1) it drops the -3 at K = 2, although that
    site changes the output most.

    Args:
        gates: w, shape (n_sites,), any float dtype, finite.
        budget: K, in sites, 1 <= K <= n_sites.
    Returns:
        (n_sites,), dtype and device of `gates`.
    """
    kept = torch.zeros_like(gates)
    places = torch.argsort(gates, descending=True, stable=True)[:budget]
    kept[places] = gates[places]
    return kept


class PublishedLinear(nn.Module):
    """A frozen linear map with the published adapter on it."""

    def __init__(self, base: nn.Linear, A: Tensor, B: Tensor, scaling: float) -> None:
        super().__init__()
        self.base, self.scaling = base, scaling
        self.A = nn.Parameter(A.detach().T.clone())  # (d_in, r)
        self.B = nn.Parameter(B.detach().T.clone())  # (r, d_out)
        self.omega = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        delta = self.omega * self.scaling * (self.A @ self.B)  # (d_in, d_out)
        return self.base(x) + x @ delta


def install_published_(
    model: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor]], scaling: float
) -> list[PublishedLinear]:
    """Put the published layer in the place of the named linear maps.

    Args:
        model: the base model, frozen by the caller.
        factors: LoRA's A (r, d_in) and B (d_out, r) by module name; they are copied.
        scaling: s, the same for all.
    Returns:
        The layers, in the order of `factors`.
    """
    layers = []
    for name, (A, B) in factors.items():
        layers.append(PublishedLinear(model.get_submodule(name), A, B, scaling))
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layers[-1])
    return layers


class PublishedUpdate:
    """The update of a warm-up step, after the backward pass.

    Attributes:
        layers: the published layers.
        optimizer: AdamW on their A and B, and on what else is trained.
    """

    def __init__(
        self,
        layers: Sequence[PublishedLinear],
        budget: int,
        learning_rate: float,
        others: Sequence[nn.Parameter] = (),
        gate_learning_rate: float = GATE_LEARNING_RATE,
    ) -> None:
        self.layers, self.budget = layers, budget
        self.gate_learning_rate = gate_learning_rate
        factors = [factor for layer in layers for factor in (layer.A, layer.B)]
        self.optimizer = torch.optim.AdamW([*factors, *others], lr=learning_rate, weight_decay=0.01)

    @torch.no_grad()
    def step(self) -> list[float]:
        """Step, project and clear the gradients.

        Returns:
            omega of every layer, some of them zero.
        """
        self.optimizer.step()
        moved = []
        for layer in self.layers:
            assert layer.omega.grad is not None
            layer.omega -= self.gate_learning_rate * layer.omega.grad
            moved.append(layer.omega.item())  # waits for the device once per layer, as released
        for layer, gate in zip(self.layers, keep_largest_signed(torch.tensor(moved), self.budget), strict=True):
            layer.omega.copy_(gate)
            layer.omega.grad = None
        self.optimizer.zero_grad()
        return [layer.omega.item() for layer in self.layers]
