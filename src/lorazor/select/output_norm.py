"""The score `output-norm`: how large a site's output is beside that of the weight it adapts, on data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorazor.adapter.sites import LiveSite
from lorazor.data.batches import IGNORED, Batch
from lorazor.errors import MeasureError, UnsupportedAdapterError
from lorazor.measure.engines import on_model
from lorazor.measure.sharding import measure_sharded


@torch.no_grad()
def output_norms(
    model: PreTrainedModel, sites: Sequence[LiveSite], batches: Sequence[Batch], label: str | None = None
) -> NDArray[np.float64]:
    """The relative size of every site's output on every example, shared between processes.

        mean over the tokens of  ||s B A x|| / ||W x||

    Args:
        model: in evaluation mode.
        sites: linear maps.
        batches: from `make_batches`; padding does not count.
        label: text of a progress bar on stderr; none if left out.
    Returns:
        (n_examples, n_sites), examples in the order of their index.
    Raises:
        UnsupportedAdapterError: a site is an embedding.
        MeasureError: a norm is not a number.
    Source: the idea of Zhou et al., arXiv:2402.07721 (LoRA-drop).
    """
    for site in sites:
        if site.adapter not in site.module.lora_B:
            raise UnsupportedAdapterError(f"{site.name} is an embedding: it has no output norm. Score by 'norm'.")

    def measure(batch: Batch) -> list[tuple[int, list[float]]]:
        batch = on_model(model, batch)
        with _observed(sites, len(batch.indices)) as seen:
            model(**batch.inputs)
        ratios = torch.stack(
            [_mean_ratio(batch, norms[0], norms[1], site.scaling) for norms, site in zip(seen, sites, strict=True)]
        )
        if not torch.isfinite(ratios).all():
            site = sites[int((~torch.isfinite(ratios)).nonzero()[0][0])]
            raise MeasureError(f"The output norm of {site.name} is not a number. Check the adapter for NaN weights.")
        return list(zip(batch.indices, ratios.T.tolist(), strict=True))

    rows = sorted(measure_sharded(batches, measure, lambda rows: None, label))
    return np.array([ratios for _, ratios in rows])


@contextmanager
def _observed(sites: Sequence[LiveSite], n_rows: int) -> Iterator[list[list[Tensor]]]:
    """For every site the norms of W x and of B A x, (rows, tokens) each, once the model has run in the block."""
    seen: list[list[Tensor]] = [[] for _ in sites]

    def keep(norms: list[Tensor], module: nn.Module, inputs: tuple, output: Tensor) -> None:
        norms.append(output.float().view(n_rows, -1, output.shape[-1]).norm(dim=-1))

    with ExitStack() as stack:
        for site, norms in zip(sites, seen, strict=True):
            for module in (site.module.get_base_layer(), site.module.lora_B[site.adapter]):  # in this order they run
                stack.callback(module.register_forward_hook(partial(keep, norms)).remove)
        yield seen


def _mean_ratio(batch: Batch, of_base: Tensor, of_site: Tensor, scaling: float) -> Tensor:
    """(rows,) float64 on the CPU: the mean ratio over the tokens that are no padding."""
    masks = [batch.inputs.get("attention_mask")]
    if batch.targets.ndim == 2:
        masks.append(batch.targets != IGNORED)  # a decoder, which has no mask of its own
    mask = next((one for one in masks if one is not None and one.shape == of_base.shape), torch.ones_like(of_base))
    mask = mask.to(of_base.device).double()
    ratio = scaling * of_site.double() / of_base.double().clamp(min=1e-12)
    return ((ratio * mask).sum(dim=1) / mask.sum(dim=1)).cpu()
