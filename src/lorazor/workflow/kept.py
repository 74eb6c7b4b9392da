"""Selections on a model in memory: one for all that it computes, or one for each row of a batch. No files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorazor.adapter.directions import to_singular_form_
from lorazor.adapter.gates import gated, site_gates
from lorazor.adapter.prune import entries_of
from lorazor.adapter.sites import AS_PLAIN_LORA, LiveSite, find_sites, site_parameters
from lorazor.errors import RowsUnclearError, SelectionError, UnsupportedAdapterError
from lorazor.selection import SelectedSite, Selection
from lorazor.workflow.basis import read_factors

AnySelection = Selection | str | Path


@contextmanager
def kept(model: nn.Module, selection: AnySelection | Sequence[AnySelection], *, copies: int = 1) -> Iterator[None]:
    """Let a model compute inside the block what it would with a selection of its adapter, without writing one.

        with lorazor.kept(model, selection):
            model.generate(...)

    What a selection drops is not computed. Of directions, those are meant that the selection was made on: A and B of
    sites that are cut are rewritten to that basis for the block. Merging does not see any of this.

    Args:
        model: with one active adapter, not merged: a `PeftModel`, or a transformers model.
        selection: what stays, or the file that says it; of the file of a shrink run, the directions are those of that
            run. Or one for each row of the batches that are computed inside the block, with or without a cache of keys
            and values.
        copies: with a selection for each row: what `generate` makes of a row, `num_beams` in beam search, or
            `num_return_sequences` without.
    Raises:
        SelectionError: a selection is for another adapter, or several of them are about other directions.
        UnsupportedAdapterError: a selection cuts a site that cannot be taken apart, or gives DoRA a weight.
        RowsUnclearError: there are several selections, and this model mixes rows, or has LoRA on parameters; or, from
            inside the block, a batch has another number of rows.
        AdapterError: the adapter cannot be used, see `find_sites`.
    """
    sites = find_sites(model)
    given = [selection] if isinstance(selection, Selection | str | Path) else list(selection)
    selections = [_read(one) for one in given]
    if not selections:
        raise SelectionError("No selections. Pass one, or one for each row.")
    entries = [entries_of(sites, one, "the adapter of the model") for one, _ in selections]
    cut = [site for site in sites if any(one[site.name].components is not None for one in entries)]
    _check_directions(cut, selections)
    _check_weights(sites, entries)
    if len(selections) > 1:
        _check_rows_are_apart(sites)
    columns = [_gates(sites, one) for one in entries]
    with ExitStack() as stack:
        stack.enter_context(_in_basis(cut, selections[0][1]))
        if len(selections) > 1:
            _check_rows_lead(model, sites)
            stack.enter_context(gated(sites, torch.stack(columns, dim=1), copies=copies))
        else:
            stack.enter_context(gated(sites, columns[0]))
        yield


Factors = dict[str, tuple[Tensor, Tensor]]


def _read(selection: AnySelection) -> tuple[Selection, Factors]:
    """A selection, and the directions of the run that it is in; none where they are the singular ones."""
    if isinstance(selection, Selection):
        return selection, {}
    return Selection.load(selection), dict(read_factors(Path(selection).parent))


def _check_directions(cut: Sequence[LiveSite], selections: Sequence[tuple[Selection, Factors]]) -> None:
    """Refuse what cannot be cut, and directions that are not known or not the same ones."""
    whole = next((site.name for site in cut if not site.has_directions), None)
    if whole is not None:
        raise UnsupportedAdapterError(
            f"{whole} is an embedding, a convolution, DoRA, or has a bias of B: it has no directions to choose from. "
            "Keep or drop it as a whole."
        )
    for selection, factors in selections:
        if selection.settings.get("basis") == "balanced" and any(one.components for one in selection.kept):
            if not factors:
                raise SelectionError(
                    "The directions of this selection are those of the run that made it, not the singular ones. Pass "
                    "the path of the selection.json inside that run folder, beside its basis.safetensors."
                )
    first = selections[0][1]
    for _, factors in selections[1:]:
        same = factors.keys() == first.keys() and all(
            torch.equal(one, other) for name in first for one, other in zip(first[name], factors[name], strict=True)
        )
        if cut and not same:
            raise SelectionError("The selections are about directions of different runs. Pass those of one run.")


def _check_weights(sites: Sequence[LiveSite], entries: Sequence[dict[str, SelectedSite]]) -> None:
    """Refuse weights of DoRA, of which no written adapter can have any."""
    dora = [site.name for site in sites if site.is_dora]
    weighted = next((name for one in entries for name in dora if one[name].keep and one[name].weight != 1), None)
    if weighted is not None:
        raise UnsupportedAdapterError(
            f"{weighted} is DoRA, which divides by the norm of W + s B A: it is kept with weight 1 or dropped. "
            f"{AS_PLAIN_LORA}"
        )


def _check_rows_are_apart(sites: Sequence[LiveSite]) -> None:
    """Refuse rows of their own where LoRA changes weights that all rows share."""
    shared = next((site.name for site in sites if site.is_on_parameter), None)
    if shared is not None:
        raise RowsUnclearError(
            f"{shared} is LoRA on a parameter (experts, routers), which all rows of a batch share. Pass one selection, "
            "and the rows that have another one in a batch of their own."
        )


def _gates(sites: Sequence[LiveSite], entries: dict[str, SelectedSite]) -> Tensor:
    """(n_gates,): what a selection multiplies every direction by."""
    columns = []
    for site in sites:
        entry = entries[site.name]
        gates = torch.zeros(site.n_gates)
        if entry.keep and entry.components is None:
            gates.fill_(entry.weight)
        elif entry.keep and entry.components is not None:
            weights = entry.component_weights or [1.0] * len(entry.components)
            gates[list(entry.components)] = entry.weight * torch.tensor(weights, dtype=gates.dtype)
        columns.append(gates)
    return torch.cat(columns)


@contextmanager
def _in_basis(cut: Sequence[LiveSite], factors: Factors) -> Iterator[None]:
    """Have A and B of sites in the basis that their components are of, inside the block."""
    pairs = {site.name: site_parameters(site.module, site.adapter) for site in cut}
    before = {name: [one.detach().clone() for one in pair] for name, pair in pairs.items()}
    try:
        to_singular_form_([site for site in cut if site.name not in factors])
        with torch.no_grad():
            for name in pairs.keys() & factors.keys():
                for parameter, factor in zip(pairs[name], factors[name], strict=True):
                    parameter.copy_(factor)
        yield
    finally:
        with torch.no_grad():
            for name, pair in pairs.items():
                for parameter, one in zip(pair, before[name], strict=True):
                    parameter.copy_(one)


@torch.no_grad()
def _check_rows_lead(model: nn.Module, sites: Sequence[LiveSite]) -> None:
    """Prove on two rows of three tokens that a gate of a row reaches that row and no other.

    Raises:
        RowsUnclearError: it does not, or the model reads something else than tokens.
    """
    base: Any = model
    if getattr(base, "main_input_name", "input_ids") != "input_ids":
        raise RowsUnclearError(
            f"{type(base).__name__} reads no tokens, so rows cannot be told apart. Pass one selection."
        )
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]], device=next(base.parameters()).device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if base.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    on = base(**inputs)[0].double()
    with gated(sites, site_gates(sites, torch.zeros(len(sites)))):
        off = base(**inputs)[0].double()
    with gated(sites, site_gates(sites, torch.tensor([1.0, 0.0]).expand(len(sites), 2)), copies=1):
        mixed = base(**inputs)[0].double()
    expected = torch.stack([on[0], off[1]])
    if not float((mixed - expected).abs().max()) <= 1e-3 * float((on - off).abs().max()):
        raise RowsUnclearError(
            f"{type(base).__name__} mixes what belongs to the rows of a batch. Pass one selection, and the rows apart."
        )
