"""Gates: a number on every direction of a site, `h = W x + s sum_j g_j b_j (a_j . x)`.

A gate multiplies one of the r numbers that A puts out for a token: behind dropout, in front of B and the scaling. Gate
1 is plain LoRA, gate 0 the base model, both exactly; the gate of a site is one number for all of its directions. Sites
that cannot be taken apart (embeddings, convolutions, sites whose B has a bias) have a single gate, on PEFT's scaling.
On a parameter, such as those of experts, the update is added to the weights before any token is there: gates are on
the rows of A, for the time of a forward pass. A site of DoRA has a single gate as well, on what it adds to W x: 0 and 1
are exact there too, but what is in between no file can hold. Gates inside of gates multiply.

Everything here but `fold_` is undone when its block ends. Merging does not see gates: fold first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lorazor.adapter.sites import AS_PLAIN_LORA, LiveSite, Site, check_is_unmerged, site_parameters
from lorazor.errors import RowsUnclearError, SettingsError, UnsupportedAdapterError

_ONE_OF_SEVERAL = re.compile(r".+?\.\d+\..*\d.*\.[^.]+")
"""A module with something numbered between the layer and itself: `layers.3.experts.0.fc1`, `layers.3.expert_0.fc1`."""


def site_gates(sites: Sequence[Site], values: Tensor | Sequence[float]) -> Tensor:
    """One number per site as gates: that number for each of its directions.

    Args:
        sites: the sites.
        values: (n_sites,), or (n_sites, rows).
    Returns:
        (n_gates,), or (n_gates, rows); gradients pass through.
    Raises:
        SettingsError: another number of values than sites.
    """
    values = torch.as_tensor(values)
    if len(values) != len(sites):
        raise SettingsError(f"{len(values)} gates for {len(sites)} sites. Pass one gate per site.")
    counts = torch.tensor([site.n_gates for site in sites], dtype=torch.long, device=values.device)
    return values.repeat_interleave(counts, dim=0)


@contextmanager
def gated(
    sites: Sequence[LiveSite], gates: Tensor, lengths: Collection[int] | None = None, copies: int | None = None
) -> Iterator[None]:
    """Put gates on sites inside the block.

    A site whose gates are all 0 and need no gradient is switched off and not computed: a seventh of the time of a small
    model. Under gradient checkpointing (non-reentrant), call backward inside the block.

    Args:
        sites: the sites, in the order of the gates.
        gates: (n_gates,), those of the first site first, see `site_gates`; or (n_gates, rows) for gates of each row of
            the batch. A tensor that requires gradients gets them, in its own dtype.
        lengths: tokens that a row has, for gates of rows at modules that see (rows * tokens, d); any number if left
            out.
        copies: the caller knows that the model keeps one row after the other, each once or in so many copies (beams),
            see `split_rows`.
    Raises:
        SettingsError: not a gate for each of the sites' gates, another shape, or a gate that is not finite.
        RowsUnclearError: from the model inside the block: a module mixes rows that have gates of their own.
        AdapterError: a site is merged into its base weight, so that no gate reaches it.
    """
    _check(sites, gates)
    sizes = [site.n_gates for site in sites]
    fixed = None if gates.requires_grad else gates.detach().cpu().split(sizes)
    there = {device: gates.to(device).split(sizes) for device in {device_of(site) for site in sites}}
    with ExitStack() as stack:
        for index, site in enumerate(sites):
            if fixed is not None and bool((fixed[index] == 1).all()):
                continue
            gate = there[device_of(site)][index]
            is_out = fixed is not None and not bool(fixed[index].any())
            if is_out and list(site.module.active_adapters) == [site.adapter]:
                stack.enter_context(_switched_off(site))
            else:
                stack.callback(put_gate_(site, gate.new_zeros(()) if is_out else gate, lengths, copies))
        yield


@contextmanager
def silenced(sites: Iterable[LiveSite]) -> Iterator[None]:
    """Switch sites off inside the block: they compute what the base model computes, whatever is in A and B."""
    sites = list(sites)
    with gated(sites, site_gates(sites, torch.zeros(len(sites)))):
        yield


def put_gate_(
    site: LiveSite, gate: Tensor, lengths: Collection[int] | None = None, copies: int | None = None
) -> Callable[[], None]:
    """Put gates on one site, until the function that is returned is called.

    Args:
        site: the site.
        gate: on the site's device: () for the whole site, (r,) for its directions, (r, rows) for each row of the batch;
            of a site that cannot be taken apart (), (1,) or (1, rows). A leaf stays one: it gathers the gradients of
            any number of backward passes, and may be changed in place between them.
        lengths: see `gated`.
        copies: see `gated`.
    """
    module: Any = site.module
    if site.is_on_parameter:
        return _GatedRows(site, gate).put_on_(module)
    if site.has_directions or site.is_dora:  # of DoRA, the module of m puts out all that the site adds to W x
        down = (module.lora_magnitude_vector if site.is_dora else module.lora_A)[site.adapter]
        return down.register_forward_hook(lambda _, inputs, output: _times(output, gate, site, lengths, copies)).remove
    before = module.scaling[site.adapter]
    module.scaling[site.adapter] = _Scale(before, lambda update: _times(update, gate, site, lengths, copies))
    return partial(module.scaling.__setitem__, site.adapter, before)


def is_gated(site: LiveSite) -> bool:
    """Whether gates are on a site, or another hook on its A that looks like one."""
    module: Any = site.module
    if site.is_on_parameter:
        return any(isinstance(getattr(one, "__self__", None), _GatedRows) for one in module._forward_pre_hooks.values())
    if site.has_directions or site.is_dora:
        return bool((module.lora_magnitude_vector if site.is_dora else module.lora_A)[site.adapter]._forward_hooks)
    return isinstance(module.scaling[site.adapter], _Scale)


@torch.no_grad()
def fold_(sites: Sequence[LiveSite], gates: Tensor) -> None:
    """Multiply the gates into B (and its bias), for good.

    Args:
        sites: the sites, in the order of the gates.
        gates: (n_gates,), see `site_gates`.
    Raises:
        SettingsError, AdapterError: see `gated`; no site is changed then.
        UnsupportedAdapterError: a gate other than 1 on a site of DoRA, likewise.
    """
    _check(sites, gates)
    if gates.ndim != 1:
        raise SettingsError(f"gates of shape {tuple(gates.shape)} cannot be folded. Pass (n_gates,).")
    each = list(zip(sites, gates.split([site.n_gates for site in sites]), strict=True))
    for site, own in each:
        if site.is_dora and not bool((own == 1).all()):
            raise UnsupportedAdapterError(
                f"{site.name} is DoRA, which divides by the norm of W + s B A: a gate cannot be multiplied into B. "
                f"Switch the site off (silenced), or leave it out (prune). {AS_PLAIN_LORA}"
            )
    for site, own in each:
        if site.is_dora:
            continue
        own = own.repeat_interleave(site.n_experts)  # columns of B are direction after direction
        for parameter in site_parameters(site.module, site.adapter)[1:]:
            parameter.mul_(own.to(parameter.device) if site.has_directions else float(own))


def device_of(site: LiveSite) -> torch.device:
    """Where the numbers of a site are."""
    return site_parameters(site.module, site.adapter)[0].device


def _check(sites: Sequence[LiveSite], gates: Tensor) -> None:
    n_gates = sum(site.n_gates for site in sites)
    if gates.ndim not in (1, 2) or len(gates) != n_gates:
        raise SettingsError(
            f"gates of shape {tuple(gates.shape)} for {len(sites)} sites with {n_gates} gates. Pass (n_gates,) or "
            "(n_gates, rows); site_gates() repeats one number per site."
        )
    if not bool(torch.isfinite(gates.detach()).all()):
        raise SettingsError("A gate is NaN or infinite. Pass finite numbers.")
    check_is_unmerged(sites)


class _GatedRows:
    """Gates on the rows of A, in A's place while the module that has the parameter runs."""

    def __init__(self, site: LiveSite, gate: Tensor) -> None:
        self._site, self._gate, self._kept = site, gate, None

    def put_on_(self, module: nn.Module) -> Callable[[], None]:
        undo = ExitStack()
        undo.callback(module.register_forward_pre_hook(self.begin).remove)
        # in front of those that are there: what was put on last goes first
        undo.callback(module.register_forward_hook(self.end, prepend=True, always_call=True).remove)
        return undo.close

    def begin(self, *_: Any) -> None:
        gate = self._gate
        if gate.ndim == 2 and gate.shape[1] > 1:
            raise RowsUnclearError(
                f"{self._site.name} changes a weight that all rows of a batch share. Give gates to batches of one row."
            )
        down: Any = self._site.module.lora_A[self._site.adapter]
        rows = gate.reshape(-1).expand(self._site.n_gates).repeat(self._site.n_experts)  # expert after expert
        kept = down.weight
        gated = (kept * rows[:, None]).to(kept.dtype)
        del down.weight
        self._kept, down.weight = kept, gated

    def end(self, *_: Any) -> None:
        if self._kept is not None:
            down: Any = self._site.module.lora_A[self._site.adapter]
            del down.weight
            down.weight, self._kept = self._kept, None


class _Scale:
    """PEFT's scale of a site with a gate on it: `update * scale` asks it for the product.

    A number times a gate in its place would be a node of one forward pass, stale and freed after its backward pass.
    """

    def __init__(self, before: Any, gate: Callable[[Tensor], Tensor]) -> None:
        self._before, self._gate = before, gate

    def __rmul__(self, update: Tensor) -> Tensor:
        return self._gate(update) * self._before


def _times(
    numbers: Tensor, gates: Tensor, site: LiveSite, lengths: Collection[int] | None, copies: int | None
) -> Tensor:
    """What a part of a site puts out, times its gates.

    Product and gradient have the precision of `gates`, whatever the model computes in; 0 and 1 are exact. The numbers
    are (..., r) of A, or (..., d) of a site that cannot be taken apart.
    """
    if gates.ndim < 2:
        return (numbers * gates.reshape(-1)).to(numbers.dtype)  # of () torch would take the value, not the precision
    is_lookup = site.adapter in site.module.lora_embedding_A  # (tokens,) of all rows alike, such as positions
    shown = numbers[None] if is_lookup and numbers.ndim == 2 else numbers
    rows = split_rows(shown, gates.shape[1], site, lengths, copies)  # (rows, positions, r or d)
    return (rows * gates.T[:, None, :]).to(numbers.dtype).reshape(numbers.shape)


@contextmanager
def _switched_off(site: LiveSite) -> Iterator[None]:
    """Leave out a site that carries no other adapter. PEFT's switch skips its work, and also moves requires_grad."""
    module: Any = site.module
    if module.disable_adapters:
        yield
        return
    before = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    module.enable_adapters(False)
    try:
        yield
    finally:
        module.enable_adapters(True)
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)


# Which of the numbers that a module puts out belong to which row of the batch


def sequence_lengths(inputs: Mapping[str, Tensor]) -> set[int]:
    """The numbers of tokens that the rows of a batch have, as far as its inputs (rows, tokens, ...) say."""
    return {tensor.shape[1] for tensor in inputs.values() if tensor.ndim > 1}


def split_rows(
    output: Tensor, n_rows: int, site: Site, lengths: Collection[int] | None = None, copies: int | None = None
) -> Tensor:
    """View what a module of a site puts out as (rows, positions, d).

    Accepted is only what can be nothing but one row of the batch after the other:

    * anything, where the batch has one row;
    * (rows, n, ..., d) with n other than the rows: else the first axis may be that of the tokens (XLNet, Longformer);
    * (rows * tokens, d), as OPT's MLP has it, and outside of the layers (rows, d), such as a pooler's. But not from a
      module that is one of several in its layer, `experts.0.fc1`: an expert gets some of the tokens, in its own order.

    Where it is known that rows lead, the first axis counts them, or their copies, and only its length has to fit:
    (rows, n, ..., d), (rows * copies, n, ..., d) and (rows * copies * tokens, d). Experts are no better off.

    Args:
        output: what the module put out.
        n_rows: rows of the batch.
        site: where the module is.
        lengths: tokens that a row may have in (rows * tokens, d); any number if left out.
        copies: of each row, one after the other, where that is known; 1 where there are none.
    Raises:
        RowsUnclearError: it may be something else.
    """
    if n_rows == 1:
        return output.reshape(1, -1, output.shape[-1])
    if copies is not None:
        is_alone = output.shape[0] % n_rows == 0 and not _ONE_OF_SEVERAL.fullmatch(site.name)
        is_clear = output.shape[0] in (n_rows, n_rows * copies) if output.ndim > 2 else is_alone
    elif output.ndim > 2:
        is_clear = output.shape[0] == n_rows != output.shape[1]
    else:
        n_positions, n_over = divmod(output.shape[0], n_rows)
        is_known = lengths is None or n_positions in lengths or (site.stack is None and n_positions == 1)
        is_clear = n_over == 0 and is_known and not _ONE_OF_SEVERAL.fullmatch(site.name)
    if not is_clear:
        advice = "Give gates to rows in smaller batches, at last of one row."
        if copies is not None:
            advice = "Compute batches of as many rows; if generate makes copies of them, say how many (copies=)."
        raise RowsUnclearError(
            f"{site.name} puts out {tuple(output.shape)} for a batch of {n_rows} rows, which does not say what belongs "
            f"to which row. {advice}"
        )
    return output.reshape(n_rows, -1, output.shape[-1])
