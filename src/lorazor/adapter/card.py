"""The model card of a pruned adapter: what was removed and what it cost, in one section of README.md."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path

from lorazor.adapter.sites import Site
from lorazor.adapter.tensors import n_parameters_kept
from lorazor.selection import SelectedSite, Selection

CARD_FILE = "README.md"

SECTION_START = "<!-- lorazor:pruned:start -->"
SECTION_END = "<!-- lorazor:pruned:end -->"
_REMOVED = "The other sites were removed: there the model computes what its base model computes."


def write_card(source: Path, target: Path, section: str, base_model: str | None = None) -> None:
    """Write the model card of a pruned adapter: that of the adapter, with the section about what was done to it.

    Everything else stays as it was, with line breaks and bytes that are not UTF-8; the section replaces an earlier one,
    or stands at the end.

    Args:
        source: folder of the adapter, with or without a card.
        target: folder of the pruned one.
        section: what `removal_section` returned, or another one between two comments of its own.
        base_model: `base_model_name_or_path` for a minimal card.
    """
    if (source / CARD_FILE).is_file():
        card = (source / CARD_FILE).read_bytes().decode("utf-8", "surrogateescape")
    else:  # a JSON string is a YAML string, whatever is in the name
        base_line = f"base_model: {json.dumps(base_model, ensure_ascii=False)}\n" if base_model else ""
        card = f"---\n{base_line}library_name: peft\n---\n\n# LoRA adapter\n"
    first, *_, last = section.splitlines()
    start = card.find(first)
    end = card.find(last, start)
    if start >= 0 and end >= 0:
        card = card[:start] + section + card[end + len(last) :]
    else:
        card += ("" if not card else "\n" if card.endswith("\n") else "\n\n") + section + "\n"
    (target / CARD_FILE).write_bytes(card.encode("utf-8", "surrogateescape"))


def removal_section(sites: Sequence[Site], selection: Selection, note: str | None = None) -> str:
    """Describe what a selection removes from an adapter, in Markdown.

    Args:
        sites: all sites of the adapter before pruning, in execution order.
        selection: which of them stay.
        note: what it cost, in words and numbers; None says that nobody measured it.
    Returns:
        The section between its two comment markers, without a line break at the end.
    """
    kept = {entry.name: entry for entry in selection.kept}
    n_folded = sum(entry.weight != 1.0 or entry.component_weights is not None for entry in selection.kept)
    folded = f" Into {n_folded} of them a weight other than 1 was folded." if n_folded else ""
    parameters_before, parameters_after = sum(site.n_parameters for site in sites), _n_parameters(sites, kept)
    share = 100 * parameters_after / parameters_before
    lowered = [entry for entry in selection.kept if entry.kept_rank != entry.rank]
    ranks = (
        f"Of {len(lowered):,} of the kept sites some directions of B A were removed too: their rank was "
        f"{_range([one.rank for one in lowered])} and is {_range([one.kept_rank for one in lowered])}."
    )
    lines = [
        SECTION_START,
        "## Pruned with lorazor",
        "",
        f"This adapter keeps {len(kept):,} of {len(sites):,} LoRA sites and {parameters_after:,} of "
        f"{parameters_before:,} LoRA parameters ({share:.1f} %), chosen by `{selection.method}`.{folded}",
        *([_REMOVED] if len(kept) < len(sites) else []),
        *([ranks] if lowered else []),
        "",
        "| layers | LoRA sites kept | ranks | parameters kept |"
        if lowered
        else "| layers | LoRA sites kept | parameters kept |",
        "|---|---|---|---|" if lowered else "|---|---|---|",
        *_layer_rows(sites, kept, bool(lowered)),
        "",
        f"Cost: {note}" if note else "Cost: not measured.",
        SECTION_END,
    ]
    return "\n".join(lines)


def _range(numbers: Sequence[int]) -> str:
    """Such as "8" or "1 to 8", nothing of none."""
    return " to ".join(str(one) for one in sorted({min(numbers), max(numbers)})) if numbers else ""


def _layer_rows(sites: Iterable[Site], kept: Mapping[str, SelectedSite], with_ranks: bool) -> Iterable[str]:
    """One row per run of neighbouring layers that keep the same kinds of sites, then the sites outside stacks."""

    def kinds(layer: tuple[tuple[str | None, int | None], list[Site]]) -> tuple[str | None, set[str], set[str]]:
        (stack, _), group = layer
        return stack, {site.kind for site in group}, {site.kind for site in group if site.name in kept}

    layers = [(key, list(group)) for key, group in groupby(sites, key=lambda site: (site.stack, site.layer))]
    for (stack, *_), run in groupby(layers, key=kinds):
        keys, groups = zip(*run, strict=True)
        members = [site for group in groups for site in group]
        survivors = [site for site in members if site.name in kept]
        ranks = _range([kept[site.name].kept_rank for site in survivors])
        numbers = [layer for _, layer in keys]
        is_range = len(numbers) > 2 and numbers[-1] - numbers[0] == len(numbers) - 1
        layer_range = f"{numbers[0]} to {numbers[-1]}" if is_range else ", ".join(map(str, numbers))
        named = ", ".join(f"`{kind}`" for kind in dict.fromkeys(site.kind for site in survivors))
        yield (
            "| "
            + ("outside the layers" if stack is None else f"`{stack}` {layer_range}")
            + f" | {len(survivors):,} of {len(members):,}"
            + (f": {named} " if 0 < len(survivors) < len(members) else " ")
            + (f"| {ranks} " if with_ranks else "")
            + f"| {_n_parameters(members, kept):,} of {sum(site.n_parameters for site in members):,} |"
        )


def _n_parameters(sites: Iterable[Site], kept: Mapping[str, SelectedSite]) -> int:
    return sum(n_parameters_kept(site, kept[site.name]) for site in sites if site.name in kept)
