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
"""Which sites stay, as a figure beside the card."""

SECTION_START = "<!-- lorazor:pruned:start -->"
SECTION_END = "<!-- lorazor:pruned:end -->"
_REMOVED = "The other sites were removed: there the model computes what its base model computes."


def pruned_card(card: str | None, section: str, base_model: str | None = None) -> str:
    """Put the section about pruning into a model card.

    Args:
        card: text of the card, with or without YAML front matter and an earlier section; None makes a minimal card.
        section: what `removal_section` returned.
        base_model: `base_model_name_or_path` for a minimal card.
    Returns:
        The card with everything else as it was; the section replaces an earlier one, or stands at the end.
    """
    if card is None:
        card = _minimal_card(base_model)
    start = card.find(SECTION_START)
    end = card.find(SECTION_END, start)
    if start >= 0 and end >= 0:
        return card[:start] + section + card[end + len(SECTION_END) :]
    gap = "" if not card else "\n" if card.endswith("\n") else "\n\n"
    return card + gap + section + "\n"


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
    lowered = any(entry.kept_rank != entry.rank for entry in selection.kept)
    lines = [
        SECTION_START,
        "## Pruned with lorazor",
        "",
        f"This adapter keeps {len(kept):,} of {len(sites):,} LoRA sites and {parameters_after:,} of "
        f"{parameters_before:,} LoRA parameters ({share:.1f} %), chosen by `{selection.method}`.{folded}",
        *([_REMOVED] if len(kept) < len(sites) else []),
        *([_rank_sentence(selection)] if lowered else []),
        "",
        "| layers | LoRA sites kept | ranks | parameters kept |"
        if lowered
        else "| layers | LoRA sites kept | parameters kept |",
        "|---|---|---|---|" if lowered else "|---|---|---|",
        *_layer_rows(sites, kept, lowered),
        "",
        f"Cost: {note}" if note else "Cost: not measured.",
        SECTION_END,
    ]
    return "\n".join(lines)


def read_card(folder: Path) -> str | None:
    """Text of a folder's README.md, or None; bytes that are not UTF-8 survive a round trip through `write_card`."""
    path = folder / CARD_FILE
    return path.read_bytes().decode("utf-8", "surrogateescape") if path.is_file() else None


def write_card(folder: Path, card: str) -> None:
    """Write README.md, with the line breaks as they are in `card`."""
    (folder / CARD_FILE).write_bytes(card.encode("utf-8", "surrogateescape"))


def _minimal_card(base_model: str | None) -> str:
    # A JSON string is a YAML string, whatever is in the name.
    base_line = f"base_model: {json.dumps(base_model, ensure_ascii=False)}\n" if base_model else ""
    return f"---\n{base_line}library_name: peft\n---\n\n# LoRA adapter\n"


def _rank_sentence(selection: Selection) -> str:
    lowered = [entry for entry in selection.kept if entry.kept_rank != entry.rank]
    before, after = (entry.rank for entry in lowered), (entry.kept_rank for entry in lowered)
    return (
        f"Of {len(lowered):,} of the kept sites some directions of B A were removed too: "
        f"their rank was {_range(before)} and is {_range(after)}."
    )


def _range(numbers: Iterable[int]) -> str:
    """Such as "8" or "1 to 8"."""
    ordered = sorted(set(numbers))
    return f"{ordered[0]}" + (f" to {ordered[-1]}" if len(ordered) > 1 else "")


def _layer_rows(sites: Iterable[Site], kept: Mapping[str, SelectedSite], with_ranks: bool) -> Iterable[str]:
    """One row per run of neighbouring layers that keep the same kinds of sites, then the sites outside stacks."""
    layers = [(key, list(group)) for key, group in groupby(sites, key=lambda site: (site.stack, site.layer))]
    for (stack, _, _), run in groupby(layers, key=lambda layer: (layer[0][0], *_kinds(layer[1], kept))):
        keys, groups = zip(*run, strict=True)
        members = [site for group in groups for site in group]
        survivors = [site for site in members if site.name in kept]
        ranks = _range(kept[site.name].kept_rank for site in survivors) if survivors else ""
        where = "outside the layers" if stack is None else f"`{stack}` {_layer_range([layer for _, layer in keys])}"
        yield (
            f"| {where} | {len(survivors):,} of {len(members):,}{_named(survivors, members)} "
            + (f"| {ranks} " if with_ranks else "")
            + f"| {_n_parameters(members, kept):,} of {sum(site.n_parameters for site in members):,} |"
        )


def _layer_range(layers: Sequence[int]) -> str:
    if len(layers) > 2 and layers[-1] - layers[0] == len(layers) - 1:
        return f"{layers[0]} to {layers[-1]}"
    return ", ".join(map(str, layers))


def _kinds(group: Sequence[Site], kept: Mapping[str, SelectedSite]) -> tuple[frozenset[str], frozenset[str]]:
    return frozenset(site.kind for site in group), frozenset(site.kind for site in group if site.name in kept)


def _named(survivors: Sequence[Site], members: Sequence[Site]) -> str:
    """The kinds that stay, where it is neither all nor none."""
    if len(survivors) in (0, len(members)):
        return ""
    return ": " + ", ".join(f"`{kind}`" for kind in dict.fromkeys(site.kind for site in survivors))


def _n_parameters(sites: Iterable[Site], kept: Mapping[str, SelectedSite]) -> int:
    return sum(n_parameters_kept(site, kept[site.name]) for site in sites if site.name in kept)
