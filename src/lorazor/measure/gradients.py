"""Gradients of a model that is measured, not trained: weights frozen, dropout off, memory bounded.

With them, what reaches a site and what the loss makes of it: two small matrices per site, from one pass.
"""

from __future__ import annotations

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
        nothing = {site.name: torch.zeros(site.n_gates, site.n_gates).double() for site in sites}
        return {name: (zero, zero) for name, zero in nothing.items()}
    sums = {site.name: torch.zeros(1 + 2 * site.n_gates**2, device=device_of(site)) for site in sites}
    state, n_tokens = this_process(), 0.0
    with frozen(model), checkpointed(model, gradient_checkpointing):
        for batch in batches[state.process_index :: state.num_processes]:
            batch = on_model(model, batch)
            with ExitStack() as stack:
                for site in apart:
                    hook = _observing(sums[site.name], site.rank)
                    stack.enter_context(site.module.lora_A[site.adapter].register_forward_hook(hook))
                losses = differentiable_row_losses(model, batch)
                losses.nll_nats.sum().backward()
            n_tokens += float(losses.n_tokens.sum())
    flat = torch.cat([torch.tensor([n_tokens]).double(), *(one.double().cpu() for one in sums.values())])
    if state.num_processes > 1:
        flat = cast(Tensor, reduce(flat.to(state.device), "sum")).cpu()
    if not torch.isfinite(flat).all():
        raise MeasureError("A gradient on the examples is not a number. Check the adapter for NaN weights.")
    total, found = flat[0], {}
    for site, own in zip(sites, flat[1:].split([len(one) for one in sums.values()]), strict=True):
        of_inputs, of_gradients = own[1:].view(2, site.n_gates, site.n_gates)
        found[site.name] = of_inputs / own[0].clamp(min=1), of_gradients / total
    return found


def _observing(sums: Tensor, rank: int) -> Callable[[nn.Module, tuple, Tensor], Tensor]:
    """A forward hook on A that adds up what it puts out and the gradient of that, when the gradient comes.

    Args:
        sums: how many tokens there were, and the two sums of moments, (1 + 2 r r,).
        rank: r.
    """
    count, moments = sums[0], sums[1:].view(2, rank, rank)

    def observe(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return output
        output = output if output.requires_grad else output.detach().requires_grad_()
        z = output.detach().reshape(-1, rank)  # (tokens, r); kept until the backward pass

        def add(gradient: Tensor) -> None:
            u = gradient.reshape(z.shape)
            is_seen = u.any(dim=1, keepdim=True)
            count.add_(is_seen.sum())
            for moment, numbers in zip(moments, (z * is_seen, u), strict=True):
                moment.addmm_(numbers.float().T, numbers.float())

        output.register_hook(add)  # not at once: a checkpointed layer runs twice, its gradient comes once
        return output

    return observe
