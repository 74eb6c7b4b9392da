"""Pruning: a selection applied to an adapter folder gives a smaller, ordinary PEFT folder.

The base model is never loaded. The same adapter and selection always give the same bytes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lorazor.adapter.card import CARD_FILE, removal_section, write_card
from lorazor.adapter.experts import targets_of
from lorazor.adapter.folder import (
    BASE_PREFIX,
    CONFIG_FILE,
    PICKLE_FILE,
    WEIGHTS_FILE,
    AdapterFolder,
    read_adapter,
    split_key,
)
from lorazor.adapter.rows import ChangedRows
from lorazor.adapter.sites import Site, choose_stack, is_kept, stack_sizes
from lorazor.adapter.tensors import pruned_tensors, remaining_sites
from lorazor.errors import BoundaryError, OutputError, SelectionError
from lorazor.files import check_is_free, new_folder
from lorazor.naming import exact_keys
from lorazor.selection import SelectedSite, Selection

# Settings that narrow `target_modules` down; a list of exact names needs none of them.
_NARROWING_SETTINGS = ("layers_to_transform", "layers_pattern", "exclude_modules")
_REWRITTEN_FILES = (CONFIG_FILE, WEIGHTS_FILE, PICKLE_FILE, CARD_FILE)
# What training leaves beside an adapter: pickles, optimizer, scheduler and random states, and other models' weights.
_TRAINING_STATE = re.compile(r"\..*|.*\.(bin|pt|pth|gguf|distcp)|(optimizer|scheduler|rng_state|model)[.-].*")
# What a lorazor training leaves there; it tells of the adapter that goes in, not of the one that comes out.
_RUN_FILES = ("run.json", "training.jsonl", "selection.json", "scores.jsonl", "gates.jsonl")
_MAX_CARRIED_BYTES = 128 * 2**20  # tokenizers stay below 64 MiB; what is larger is another model


@dataclass(frozen=True)
class PruneResult:
    """What pruning did.

    Attributes:
        path: the new adapter folder.
        n_sites_kept: LoRA sites in it.
        n_sites: LoRA sites before.
        n_parameters_kept: numbers in A and B of the kept sites.
        n_parameters: numbers in A and B before.
        n_bytes: size of the weights file.
        n_bytes_before: size of the weights file before.
        ranks: the lowest and the highest rank of a kept site.
        left_out: names of files and folders that were not carried over, sorted.
    """

    path: Path
    n_sites_kept: int
    n_sites: int
    n_parameters_kept: int
    n_parameters: int
    n_bytes: int
    n_bytes_before: int
    ranks: tuple[int, int]
    left_out: tuple[str, ...] = ()


def select_boundary(
    sites: Sequence[Site], boundary: int, stack: str | None = None, drop_outside: bool = False
) -> Selection:
    """Keep the sites of the first `boundary` layers of a stack.

    Args:
        sites: all sites of an adapter.
        boundary: b in layers, 0 <= b <= L; b = L keeps every layer, b = 0 none.
        stack: the stack to cut; may be left out where there is one, or one decoder. Other stacks stay whole.
        drop_outside: also drop the sites outside every stack (`lm_head`, embeddings); they stay otherwise.
    Returns:
        A selection over all `sites` with method `boundary`.
    Raises:
        BoundaryError: `boundary` is outside 0..L.
        AdapterError: no such stack, or several to choose from.
    Source: Chen et al., arXiv:2503.23360.
    """
    stack = choose_stack(sites, stack)
    n_layers = stack_sizes(sites)[stack]
    if not isinstance(boundary, Integral) or not 0 <= boundary <= n_layers:
        raise BoundaryError(
            f"boundary={boundary}, but LoRA reaches over {n_layers} layers of {stack}. "
            f"Pass a whole number from 0 (base model) to {n_layers} (full adapter)."
        )
    boundary = int(boundary)  # from NumPy's integers, which JSON does not know

    return Selection(
        sites=tuple(
            site.entry(is_kept(site, stack, boundary) and not (drop_outside and site.stack is None)) for site in sites
        ),
        method="boundary",
        settings={"boundary": boundary, "stack": stack, "n_layers": n_layers, "drop_outside": drop_outside},
    )


def write_pruned(
    adapter: str | Path | AdapterFolder,
    selection: Selection,
    out: str | Path,
    *,
    note: str | None = None,
    factors: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    dtype: torch.dtype | None = None,
    rows: ChangedRows | None = None,
) -> PruneResult:
    """Write a smaller adapter: the kept sites, their weights folded in, and everything that is not LoRA.

    The result is an ordinary PEFT folder with exact `target_modules`, one `lora_alpha`, no `alpha_pattern` and no
    rsLoRA: where a site's scaling or weight differs from alpha / r, the factor is multiplied into B. Sites of which
    components are chosen are rewritten to these, at a lower rank. Tensors that need no factor, and tensors that are not
    LoRA (`modules_to_save`), keep their bytes.

    Args:
        adapter: adapter folder.
        selection: which sites stay, with which weight and components; it must name exactly the sites of the adapter.
        out: where to write; must not exist or be empty. It appears whole or not at all.
        note: what pruning cost, for the model card.
        factors: A (r, d_in) and B (d_out, r) of sites in the basis that the selection's components are of, with the
            same product; the singular form if left out.
        dtype: number format of A and B; each keeps its own if left out.
        rows: rows of embeddings to store in the place of whole ones.
    Raises:
        AdapterError: the adapter folder cannot be used.
        UnsupportedAdapterError: it is not plain LoRA, or components are chosen of an embedding, a convolution or a
            site with a bias of B, or components or a weight other than 1 of DoRA.
        SelectionError: the selection is for another adapter, or keeps no site.
        OutputError: `out` is taken or is the adapter itself, or the disk is full.
    """
    folder, out = adapter if isinstance(adapter, AdapterFolder) else read_adapter(adapter), Path(out)
    if out.resolve() == folder.place.resolve():
        raise OutputError(f"The output folder {str(out)!r} is the adapter itself. Choose another folder.")
    check_is_free(out)
    entries = check_fits_adapter(folder, selection)
    _check_basis(selection, factors or {})
    remaining = remaining_sites(folder, entries)
    tensors = pruned_tensors(folder, entries, remaining, factors or {}, dtype)
    changes = None
    if rows is not None:
        changes, tensors = rows.applied(folder.config, tensors)
    section = removal_section(folder.sites, selection, note)
    return write_sites(folder, remaining, tensors, out, section, changes=changes)


def write_sites(
    folder: AdapterFolder,
    sites: Sequence[Site],
    tensors: dict[str, Tensor],
    out: Path,
    section: str,
    *,
    changes: Mapping[str, Any] | None = None,
    finish: Callable[[Path], None] = lambda folder: None,
) -> PruneResult:
    """Write an adapter folder that has other sites than the one it is made of, or the same in another form.

    Args:
        folder: what it is made of: config, card, tokenizer and other small files.
        sites: its sites, of which all have the scaling lora_alpha / rank.
        tensors: all of its tensors, by key.
        out: where to write; must not exist or be empty. It appears whole or not at all.
        section: for the model card, see `write_card`.
        changes: settings of its config that differ otherwise.
        finish: is called with the folder before it appears; what it raises leaves nothing behind.
    Raises:
        OutputError: `out` is taken, or the disk is full.
    """
    config = _pruned_config(folder, sites, out) | dict(changes or {})
    with new_folder(out) as temporary:
        left_out = carry_over(folder.path, temporary)
        write_card(folder.path, temporary, section, config.get("base_model_name_or_path"))
        _save(config, tensors, temporary)
        n_bytes = (temporary / WEIGHTS_FILE).stat().st_size
        finish(temporary)
    return PruneResult(
        path=out,
        n_sites_kept=len(sites),
        n_sites=len(folder.sites),
        n_parameters_kept=sum(site.n_parameters for site in sites),
        n_parameters=sum(site.n_parameters for site in folder.sites),
        n_bytes=n_bytes,
        n_bytes_before=folder.weights.stat().st_size,
        ranks=(min(site.rank for site in sites), max(site.rank for site in sites)),
        left_out=left_out,
    )


def fold_alphas_(path: Path) -> None:
    """Give an adapter folder that was just written one `lora_alpha`, which every serving stack takes; B takes the rest.

    Args:
        path: the folder; it is rewritten where it has an `alpha_pattern`.
    """
    folder = read_adapter(path)
    if folder.config.get("alpha_pattern"):
        entries = {site.name: site.entry(True) for site in folder.sites}
        sites = remaining_sites(folder, entries)
        _save(_pruned_config(folder, sites, path), pruned_tensors(folder, entries, sites, {}, None), path)


def check_fits_adapter(folder: AdapterFolder, selection: Selection) -> dict[str, SelectedSite]:
    """The selection's entries by site name.

    Raises:
        SelectionError: it does not name exactly the sites of the adapter, with their ranks, or keeps none.
    """
    entries = entries_of(folder.sites, selection, f"the adapter {folder.name!r}")
    if not selection.kept:
        raise SelectionError(f"The selection keeps none of the {len(entries)} LoRA sites. {without_sites(folder)}")
    return entries


def entries_of(sites: Sequence[Site], selection: Selection, what: str) -> dict[str, SelectedSite]:
    """The selection's entries by site name.

    Args:
        sites: of an adapter.
        selection: which of them stay.
        what: names the adapter in the message.
    Raises:
        SelectionError: it does not name exactly these sites, with their ranks.
    """
    entries = {entry.name: entry for entry in selection.sites}
    ranks = {site.name: site.rank for site in sites}
    where = f"The selection does not fit {what}"
    if unknown := sorted(entries.keys() - ranks.keys()):
        raise SelectionError(f"{where}: the adapter has no site {_first(unknown)}. Select on the adapter's own sites.")
    if missing := sorted(ranks.keys() - entries.keys()):
        raise SelectionError(f"{where}: it says nothing about {_first(missing)}. Give every site an entry.")
    for name, entry in entries.items():
        if entry.rank != ranks[name]:
            raise SelectionError(f"{where}: it gives {name} rank {entry.rank}, but the adapter has rank {ranks[name]}.")
    return entries


def _check_basis(selection: Selection, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    if not factors and selection.settings.get("basis") == "balanced" and any(one.components for one in selection.kept):
        raise SelectionError(
            "The directions of this selection are those of the run that made it, not the singular ones. Pass the "
            "selection.json inside that run folder, beside its basis.safetensors."
        )


def without_sites(folder: AdapterFolder) -> str:
    """What remains of an adapter that keeps no site, in a sentence; PEFT loads no adapter without LoRA."""
    others = {key.removeprefix(BASE_PREFIX).rpartition(".")[0] for key in folder.shapes if split_key(key) is None}
    if not others:
        return "What remains is the base model: use it without an adapter."
    return (
        f"What remains is the base model with the adapter's own {', '.join(sorted(others))}, which no adapter without "
        "LoRA can carry: keep a site or more, or use PeftModel.from_pretrained(base_model, "
        f"{folder.name!r}).unload(), which is that model."
    )


def _first(names: Sequence[str]) -> str:
    return f"{names[0]!r}" + (f" (nor {len(names) - 1} more)" if len(names) > 1 else "")


def _pruned_config(folder: AdapterFolder, kept: Sequence[Site], out: Path) -> dict[str, Any]:
    config = {key: value for key, value in folder.config.items() if key not in _NARROWING_SETTINGS}
    # Serving stacks size their buffers by r, so it is the largest rank.
    rank, keys = max(site.rank for site in kept), exact_keys([site.name for site in kept])
    targets = targets_of(kept, [site.name for site in folder.sites])
    config.update(
        r=rank,
        rank_pattern={keys[site.name]: site.rank for site in kept if site.rank != rank},
        alpha_pattern={},
        **{key: names for key, names in targets.items() if names is not None or key in config},
    )
    if config.get("use_rslora"):
        config["use_rslora"] = False
    if folder.config.get("ensure_weight_tying") and all(site.stack is not None for site in kept):
        config["ensure_weight_tying"] = False
    base = Path(folder.config.get("base_model_name_or_path") or "")
    if not base.is_absolute() and base != Path() and (folder.place / base).is_dir():  # beside the adapter
        config["base_model_name_or_path"] = os.path.relpath((folder.place / base).resolve(), out.resolve())
    return config


def _save(config: Mapping[str, Any], tensors: dict[str, Tensor], folder: Path) -> None:
    """Write config and weights."""
    config_text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
    (folder / CONFIG_FILE).write_text(config_text + "\n", encoding="utf-8")
    try:
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    except SafetensorError as error:  # safetensors' own name for a full disk
        raise OutputError(f"Cannot write {str(folder / WEIGHTS_FILE)!r}: {error}. Nothing was written.") from error
    # safetensors makes its files readable for their owner only; let it be like the ones beside it.
    shutil.copymode(folder / CONFIG_FILE, folder / WEIGHTS_FILE)


def carry_over(source: Path, target: Path) -> tuple[str, ...]:
    """Copy tokenizer, chat templates and other small files; return the names of what was left out."""
    left_out = []
    for path in sorted(source.iterdir()):
        if path.name in _REWRITTEN_FILES:
            continue
        is_of_training = path.name in _RUN_FILES or _TRAINING_STATE.fullmatch(path.name) is not None
        if path.name == "additional_chat_templates" and path.is_dir():
            shutil.copytree(path, target / path.name, copy_function=shutil.copyfile)
        elif path.is_file() and not is_of_training and path.stat().st_size <= _MAX_CARRIED_BYTES:
            shutil.copyfile(path, target / path.name)  # follows links, as in the cache of the model hub
        else:
            left_out.append(path.name)
    return tuple(left_out)
