"""LoRA on the maps outside attention alone, of the highest rank that fits."""

from pathlib import Path

from lorazor.bench.experiment import Experiment
from lorazor.errors import SelectionError
from lorazor.selection import SelectedSite, Selection

BUDGETS = ("params",)


def train(experiment: Experiment) -> Path:
    """Sites without attention in their name."""
    return on_kinds(experiment, is_attention=False)


def on_kinds(experiment: Experiment, is_attention: bool) -> Path:
    """Fresh LoRA of one rank on the sites inside layers that are in attention, or are not."""
    sites = [
        one
        for one in experiment.sites
        if one.layer is not None and ("attn" in one.name or "attention" in one.name) == is_attention
    ]
    if not sites:
        raise SelectionError("No site is of that kind. Leave the method out for this model.")
    rank = experiment.rank_on(sites)
    kept = [SelectedSite(one.name, one.layer, one.stack, one.kind, rank, True) for one in sites]
    return experiment.on_sites(Selection(tuple(kept), "benchmark"))
