"""What an adapter has to become for a server: which sites, at which ranks, with which alpha."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lorazor.adapter.beside import bytes_beside
from lorazor.adapter.directions import energies
from lorazor.adapter.folder import BASE_PREFIX, LINEAR_PARTS, setting_of, split_key
from lorazor.adapter.sites import AS_PLAIN_LORA, Site, locate
from lorazor.adapter.tensors import pruned_tensors
from lorazor.errors import SettingsError, UnsupportedAdapterError
from lorazor.selection import SelectedSite
from lorazor.serve.base import absent_from_groups
from lorazor.serve.form import Form, Names
from lorazor.serve.judging import Judgement, judge
from lorazor.serve.settings import ExportSettings
from lorazor.serve.table import Server


@dataclass(frozen=True)
class ExportPlan:
    """An adapter as a server needs it, before it is written.

    Attributes:
        form: the adapter.
        judgement: what the server makes of it as it is.
        entries: what each of its sites keeps.
        sites: those that will be written, with the ranks of their tensors, in the one order of sites.
        filled: names of those among them that are new, and zero.
        dropped: modules beside LoRA that are left out.
        alpha: `lora_alpha`; every site is scaled by alpha / rank.
        energy_lost: share of the squared norm of all updates that cutting ranks loses; None where nothing is cut.
    """

    form: Form
    judgement: Judgement
    entries: Mapping[str, SelectedSite]
    sites: tuple[Site, ...]
    filled: Names
    dropped: Names
    alpha: float
    energy_lost: float | None

    @property
    def server(self) -> Server:
        """Whom it is for."""
        return self.judgement.server

    @property
    def folded(self) -> Names:
        """Sites of which B is multiplied by a factor."""
        before = {site.name: site.scaling for site in self.form.folder.sites}
        return tuple(one.name for one in self.sites if one.name in before and before[one.name] != one.scaling)


def plan_export(form: Form, server: Server, settings: ExportSettings) -> ExportPlan:
    """Find the form of an adapter that a server computes right.

    Args:
        form: the adapter; its base model must be known where sites have to be added.
        server: whom it is for.
        settings: what it may lose.
    Raises:
        UnsupportedAdapterError: the server cannot compute it in any form, or only without modules_to_save, which was
            not asked for; or a rank is to be cut at a site that has no directions.
        SettingsError: sites are to be added, and no base model is known.
    """
    judgement = judge(form, server)
    _check_has_other_forms(form, judgement)
    dropped = _dropped(form, judgement, settings)
    entries = {site.name: _cut(site, settings.max_rank) for site in form.folder.sites}
    ranks = _ranks(judgement, {name: entry.kept_rank for name, entry in entries.items()})
    alpha = _alpha(form, ranks)
    kept = [
        dataclasses.replace(
            site,
            rank=ranks[site.name],
            scaling=alpha / ranks[site.name],
            n_parameters=site.n_parameters * ranks[site.name] // site.rank,
        )
        for site in form.folder.sites
    ]
    filled = _absent(form, judgement)
    largest = max(ranks.values())
    sites = [*kept, *(_zero_site(form, name, largest, alpha) for name in filled)]
    return ExportPlan(
        form, judgement, entries, tuple(sites), filled, dropped, alpha, _energy_lost(form, entries)
    )  # fmt: skip


def _check_has_other_forms(form: Form, judgement: Judgement) -> None:
    """Refuse what no other form helps, and what has none.

    Raises:
        UnsupportedAdapterError: why, and what to do instead.
    """
    advice = AS_PLAIN_LORA if form.dora else "Train without it, or merge the adapter into its base model."
    where = f"{form.folder.name!r} cannot be exported for {judgement.server.title}"
    if judgement.incurable:
        raise UnsupportedAdapterError(f"{where}: it {judgement.incurable[0].sentence}. {advice}")
    if names := (*form.dora, *form.experts, *form.parameters):
        what = "is DoRA" if form.dora else "is LoRA on a parameter"
        raise UnsupportedAdapterError(
            f"{where}: {names[0]} {what}, which is computed there as it is, and has no other form. Use the folder."
        )


def planned_tensors(plan: ExportPlan) -> dict[str, Tensor]:
    """The tensors of a planned adapter by key, sorted.

    Cut sites have their largest singular directions; a factor is in B; zeros stand behind the last row of A and column
    of B up to the rank of the site; added sites are zero.
    """
    folder = plan.form.folder
    sites = {site.name: site for site in plan.sites}
    old = [sites[site.name] for site in folder.sites]
    tensors = pruned_tensors(folder, plan.entries, old, {})
    if plan.dropped:
        tensors = {key: one for key, one in tensors.items() if split_key(key) or ".base_layer." in key}
    for key, tensor in tensors.items():
        name, part = split_key(key) or ("", "lora_B.bias")
        if part != "lora_B.bias":
            axis = 1 if part.startswith(("lora_B", "lora_embedding_B")) else 0
            tensors[key] = _padded(tensor, axis, sites[name].rank)
    dtype = next(one.dtype for key, one in tensors.items() if split_key(key))
    for name in plan.filled:
        base = plan.form.base
        assert base is not None
        for part, shape in zip(LINEAR_PARTS, _shapes(base.linear[name], sites[name].rank), strict=True):
            tensors[f"{BASE_PREFIX}{name}.{part}"] = torch.zeros(shape, dtype=dtype)
    return dict(sorted(tensors.items()))


def _dropped(form: Form, judgement: Judgement, settings: ExportSettings) -> Names:
    """Modules beside LoRA that have to go.

    Raises:
        UnsupportedAdapterError: nobody asked for it.
    """
    if "drop saved modules" not in judgement.cures:
        return ()
    finding = next(one for one in judgement.findings if one.rule.cure == "drop saved modules")
    names = (*form.saved_modules, *form.trained_tokens)
    if not settings.drop_modules_to_save:
        sizes = bytes_beside(form.folder)
        listed = ", ".join(f"{name} ({sizes.get(name, 0):,} bytes)" for name in names)
        raise UnsupportedAdapterError(
            f"{judgement.server.title} {finding.rule.what}, and {form.folder.name!r} has its own {listed}. "
            "--drop-modules-to-save leaves them out: the base model's own are computed with then, and what was trained "
            "in them is lost. Or merge them into the base model that is served."
        )
    return names


def _cut(site: Site, max_rank: int | None) -> SelectedSite:
    """What stays of a site."""
    if max_rank is None or site.rank <= max_rank:
        return site.entry(True)
    if not site.has_directions:
        raise UnsupportedAdapterError(
            f"{site.name} of rank {site.rank} is an embedding, a convolution, or has a bias of B, and cannot be cut to "
            f"rank {max_rank}. Pass --max-rank {site.rank} or none."
        )
    return site.entry(True, components=tuple(range(max_rank)))


def _ranks(judgement: Judgement, ranks: Mapping[str, int]) -> dict[str, int]:
    """The rank of each site's tensors: one for all where the server needs it."""
    largest = max(ranks.values())
    if judgement.server.rank_steps:
        return dict.fromkeys(ranks, 8 if largest <= 8 else -(-largest // 16) * 16)
    return dict.fromkeys(ranks, largest) if "one rank" in judgement.cures else dict(ranks)


def _alpha(form: Form, ranks: Mapping[str, int]) -> float:
    """One alpha for all sites: the one that leaves every B as it is, if there is one, or else the adapter's own.

    Nothing is rounded in the first case; in the second, B is multiplied by a factor.
    """
    exact = {site.scaling * ranks[site.name] for site in form.folder.sites}
    alpha = exact.pop() if len(exact) == 1 else setting_of(form.folder.config, "lora_alpha")
    return int(alpha) if alpha == int(alpha) else alpha


def _absent(form: Form, judgement: Judgement) -> Names:
    """Modules that have to get a site of zeros."""
    names, added = dict.fromkeys(form.names), dict[str, None]()
    if "groups" in judgement.cures:
        pairs = (("q_proj", ("k_proj", "v_proj")), ("v_proj", ("q_proj",)), ("gate_proj", ("up_proj",)))
        while absent := [name for first, others in pairs for name in absent_from_groups([*names], first, others)]:
            names |= dict.fromkeys(absent)
            added |= dict.fromkeys(absent)
    if "layers" in judgement.cures:
        added |= dict.fromkeys(form.absent_layers)
    if not added:
        return ()
    if form.base is None:
        raise SettingsError(
            f"{judgement.server.title} needs zeros on {len(added)} modules, such as {next(iter(added))!r}, and their "
            "shapes are those of the base model. Pass it (--model)."
        )
    lacking = [name for name in added if name not in form.base.linear]
    if lacking:
        raise UnsupportedAdapterError(
            f"{judgement.server.title} needs a site on {lacking[0]!r}, which {form.base.architecture} does not have."
        )
    return tuple(added)


def _zero_site(form: Form, name: str, rank: int, alpha: float) -> Site:
    assert form.base is not None
    stack, layer, kind = locate(name)
    return Site(name, stack, layer, kind, rank, alpha / rank, rank * sum(form.base.linear[name]))


def _shapes(shape: tuple[int, int], rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    inputs, outputs = shape
    return (rank, inputs), (outputs, rank)


def _padded(tensor: Tensor, axis: int, size: int) -> Tensor:
    """Zeros behind a tensor along an axis, up to a size."""
    shape = [*tensor.shape]
    shape[axis] = size - shape[axis]
    return tensor if not shape[axis] else torch.cat([tensor, tensor.new_zeros(shape)], dim=axis).contiguous()


def _energy_lost(form: Form, entries: Mapping[str, SelectedSite]) -> float | None:
    """Share of sum_sites ||s B A||_F^2 that is cut."""
    if all(entry.components is None for entry in entries.values()):
        return None
    found = energies(form.folder)
    total = sum(float(one.sum()) for one in found.values())
    lost = sum(float(found[name][len(entry.components) :].sum()) for name, entry in entries.items() if entry.components)
    return lost / total if total else 0.0
