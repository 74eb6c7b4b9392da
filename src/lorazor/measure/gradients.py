"""Gradients of a model that is measured, not trained: weights frozen, dropout off, memory bounded.

With them, what reaches a site and what the loss makes of it: two small matrices per site, from one pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import torch
from accelerate.utils import reduce
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lorazor.adapter.gates import device_of
from lorazor.adapter.sites import LiveSite
from lorazor.data.batches import Batch
from lorazor.errors import MeasureError, SettingsError
from lorazor.measure.engines import on_model, replaced_forwards
from lorazor.measure.losses import differentiable_row_losses
from lorazor.measure.sharding import this_process


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter of the model requires gradients inside the block."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)


@contextmanager
def checkpointed(model: PreTrainedModel, wanted: bool = True) -> Iterator[None]:
    """Recompute activations in the backward pass inside the block: less memory, more time, the same gradients.

    transformers itself checkpoints layers in training mode only, and a layer in training mode drops out (BART hands
    `self.training` to `F.dropout`). So the layers that it would recompute are recomputed here, and no mode is touched.

    Args:
        model: in evaluation mode.
        wanted: False does nothing.
    Raises:
        SettingsError: the model has no layer that can be checkpointed.
    """
    if not wanted:
        yield
        return
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not model.supports_gradient_checkpointing or not layers:
        raise SettingsError(
            f"{type(model).__name__} cannot recompute its activations. Leave gradient checkpointing off, or lower "
            "the batch size."
        )
    with replaced_forwards(layers, [partial(_recompute, layer.forward) for layer in layers]):
        yield


def _recompute(forward: Callable, /, *args: Any, **kwargs: Any) -> Any:
    """The forward pass of a layer, which runs again in the backward pass."""
    # a cache would be filled twice; whole sequences need none
    args = tuple(None if isinstance(one, Cache) else one for one in args)
    kwargs = {name: None if isinstance(one, Cache) else one for name, one in kwargs.items()}
    # the inputs of the first layer need no gradient, which the reentrant form could not do with
    return checkpoint(partial(forward, **kwargs), *args, use_reentrant=False)


def gram_matrices(
    model: PreTrainedModel,
    sites: Sequence[LiveSite],
    batches: Sequence[Batch],
    *,
    gradient_checkpointing: bool = False,
) -> dict[str, tuple[Tensor, Tensor]]:
    """The second moments of both sides of every site that can be taken apart.

        M_A = mean over t of z_t z_t^T,   M_B = sum_t u_t u_t^T / n          n: answer tokens

    z is what A puts out for a token, u = s B^T g the gradient of the summed loss with respect to it, over all tokens on
    which the loss depends: not padding, nor what nothing reads in the last layer. So the product of the two, sigma^2,
    says the same of sites that see many tokens and of sites that see few.

    Args:
        model: in evaluation mode.
        sites: of its adapter; of those that cannot be taken apart, or see no tokens, the two matrices are zero.
        batches: from `make_batches`; several processes share them.
        gradient_checkpointing: recompute activations in the backward pass.
    Returns:
        M_A and M_B by site name, (r, r) float64 on the CPU.
    Raises:
        MeasureError: a number is not finite.
    """
    apart = [site for site in sites if site.has_directions and not site.is_on_parameter]
    if not apart:  # and then nothing asks for gradients
        nothing = {site.name: torch.zeros(site.n_gates, site.n_gates, dtype=torch.float64) for site in sites}
        return {name: (zeros, zeros) for name, zeros in nothing.items()}
    sums, state = MomentSums(sites), this_process()
    with frozen(model), checkpointed(model, gradient_checkpointing):
        for batch in batches[state.process_index :: state.num_processes]:
            batch = on_model(model, batch)
            with ExitStack() as stack:
                for site in apart:
                    hook = observing(partial(sums.add, site.name))
                    stack.enter_context(site.module.lora_A[site.adapter].register_forward_hook(hook))
                losses = differentiable_row_losses(model, batch)
                losses.nll_nats.sum().backward()
            sums.n_tokens += float(losses.n_tokens.sum())
    return sums.matrices()


def observing(receive: Callable[[Tensor, Tensor], None]) -> Callable[[nn.Module, tuple, Tensor], Tensor]:
    """A forward hook on A that hands on what it puts out, z, and the gradient of that, u, when the gradient comes.

    Args:
        receive: takes z and u, of one shape, (..., r), in the precision of the model.
    """

    def observe(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return output
        output = output if output.requires_grad else output.detach().requires_grad_()
        z = output.detach()  # kept until the backward pass
        # not at once: a checkpointed layer runs twice, its gradient comes once
        output.register_hook(lambda gradient: receive(z, gradient))
        return output

    return observe


class MomentSums:
    """Sums of the moments of both sides of sites, over passes; see `gram_matrices`.

    Attributes:
        n_tokens: n, answer tokens so far.
        by_site: by name, how many tokens there were, sum of z z^T and of u u^T, (1 + 2 r r,) float32, on the site's
            device.
    """

    def __init__(self, sites: Sequence[LiveSite]) -> None:
        """Begin with nothing seen."""
        self.n_tokens = 0.0
        self.by_site = {site.name: torch.zeros(1 + 2 * site.n_gates**2, device=device_of(site)) for site in sites}

    def add(self, name: str, z: Tensor, u: Tensor) -> None:
        """Add what one pass showed of a site: z and u, (..., r)."""
        sums, rank = self.by_site[name], z.shape[-1]
        z, u = z.reshape(-1, rank), u.reshape(-1, rank)
        is_seen = u.any(dim=1, keepdim=True)
        sums[0].add_(is_seen.sum())
        for moment, numbers in zip(sums[1:].view(2, rank, rank), (z * is_seen, u), strict=True):
            moment.addmm_(numbers.float().T, numbers.float())

    def flat(self) -> Tensor:
        """All of it, (n,) float64 on the CPU, summed over processes."""
        flat = torch.cat(
            [torch.tensor([self.n_tokens]).double(), *(one.double().cpu() for one in self.by_site.values())]
        )
        return summed_over_processes(flat)

    def load_flat(self, flat: Tensor) -> None:
        """Go on from what `flat` gave."""
        self.n_tokens = float(flat[0])
        for sums, own in zip(self.by_site.values(), flat[1:].split([*map(len, self.by_site.values())]), strict=True):
            sums.copy_(own)

    def matrices(self) -> dict[str, tuple[Tensor, Tensor]]:
        """M_A and M_B by site name, (r, r) float64 on the CPU, over all processes.

        Raises:
            MeasureError: a number is not finite.
        """
        flat = self.flat()
        if not torch.isfinite(flat).all():
            raise MeasureError("A gradient on the examples is not a number. Check the adapter for NaN weights.")
        total, found = flat[0], {}
        lengths = [len(one) for one in self.by_site.values()]
        for name, own in zip(self.by_site, flat[1:].split(lengths), strict=True):
            rank = math.isqrt((len(own) - 1) // 2)
            of_inputs, of_gradients = own[1:].view(2, rank, rank)
            found[name] = of_inputs / own[0].clamp(min=1), of_gradients / total
        return found


def summed_over_processes(numbers: Tensor) -> Tensor:
    """The sum of a tensor on the CPU over all processes; the tensor itself where there is one."""
    state = this_process()
    return numbers if state.num_processes == 1 else cast(Tensor, reduce(numbers.to(state.device), "sum")).cpu()
