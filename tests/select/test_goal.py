"""The goal of a search: every contradiction and every size out of range, and sizes in bytes against the file itself."""

from __future__ import annotations

import pytest
import torch

from lorazor.adapter.folder import read_adapter
from lorazor.adapter.parts import Parts
from lorazor.adapter.prune import write_pruned
from lorazor.errors import BudgetError, SettingsError
from lorazor.select.goal import Goal
from lorazor.select.scoring import Scoring, score_named
from lorazor.select.search import Family, Units
from lorazor.select.verdict import Margin
from lorazor.settings import ShrinkSettings
from tests.tiny_models import write_adapter_folder

SHAPES = {f"model.layers.{layer}.self_attn.q_proj": (4, 10, 15) for layer in range(3)}  # 300 parameters, 25 a direction


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return read_adapter(write_adapter_folder(tmp_path_factory.mktemp("goal") / "adapter", SHAPES))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    shapes = {"h.0.q": (4, 10, 15), "h.1.q": (2, 10, 15)}
    path = tmp_path_factory.mktemp("mixed") / "adapter"
    return read_adapter(write_adapter_folder(path, shapes, rank_pattern={"1.q": 2}))


def goal(folder, has_data=True, **given) -> Goal:
    return Goal.of(ShrinkSettings(**given), folder, has_data)


def test_goals(folder, mixed):
    assert goal(folder) == Goal(margin=Margin("loss", share=0.02))
    assert goal(folder, margin="rougeL=0.5") == Goal(margin=Margin("rougeL", amount=0.5))
    assert goal(folder, params_fraction=0.25) == goal(folder, params=75) == Goal(parameters=75)
    assert goal(folder, params_fraction=1.0) == Goal(parameters=300)
    assert goal(folder, max_rank=3) == Goal(rank=3)
    assert goal(mixed, max_rank=2, uniform=True) == Goal(rank=2, is_uniform=True)
    assert goal(folder, has_data=False, energy=0.99) == Goal(energy=0.99)
    assert goal(folder, has_data=False, params=75, score="random") == Goal(parameters=75)


CONTRADICTIONS = [
    ({"margin": "2%", "params": 75}, "margin=2% and params=75: pass one goal"),
    ({"margin": "2%", "params_fraction": 0.5}, "margin=2% and params_fraction=0.5: pass one goal"),
    ({"max_rank": 2, "size": "1MB"}, "size=1MB and max_rank=2: pass one goal"),
    ({"params": 75, "params_fraction": 0.5, "size": "1MB"}, "pass one goal"),
    ({"uniform": True}, "uniform goes with max_rank"),
    ({"uniform": True, "params": 75}, "uniform goes with max_rank"),
    ({"max_rank": 2, "by": "site"}, "max_rank=2 lowers ranks, but by='site' keeps them"),
    ({"energy": 0.9}, "energy is a share of the weights alone"),
    ({"margin": "much"}, "margin='much' is no margin"),
]
WITHOUT_DATA = [
    ({}, "A margin is measured on examples. Pass --data, or a size"),
    ({"margin": "2%"}, "A margin is measured on examples"),
    ({"params": 75, "score": "credit"}, "score='credit' looks at examples"),
    ({"params": 75, "score": "balanced"}, "score='balanced' looks at examples"),
]


@pytest.mark.parametrize(
    ("given", "message", "has_data"),
    [(*row, True) for row in CONTRADICTIONS] + [(*row, False) for row in WITHOUT_DATA],
)
def test_goals_that_contradict_each_other_are_refused(folder, given, message, has_data):
    with pytest.raises(SettingsError, match=message):
        goal(folder, has_data, **given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_rank": 5}, r"max_rank=5, but the sites have ranks up to 4. Pass 1..4"),
        ({"max_rank": 0}, r"max_rank=0, but .* Pass 1..4"),
        (
            {"params": 24},
            "params=24 leaves room for 24 parameters, but the adapter has 300, and the smallest direction 25",
        ),
        ({"params": 301}, "params=301 leaves room for 301 parameters, but the adapter has 300"),
        ({"params": -1}, "params=-1"),
        ({"params": 99, "by": "layer"}, "and the smallest choice by layer 100"),
        ({"params_fraction": 0.0}, "params_fraction=0.0 is no share"),
        ({"params_fraction": 1.5}, "params_fraction=1.5 is no share"),
        ({"params_fraction": 0.01}, "params_fraction=0.01 leaves room for 3 parameters"),
        ({"size": "50"}, "size=50 leaves room for 0 parameters, but .* the smallest direction 25"),
        ({"size": "much"}, "size='much' is no size"),
        ({"size": "1 TB"}, "size='1 TB' is no size"),
        ({"size": "-1MB"}, "size='-1MB' is no size"),
    ],
)
def test_sizes_out_of_range_are_refused(folder, given, message):
    with pytest.raises(BudgetError, match=message):
        goal(folder, **given)


@pytest.mark.parametrize("energy", [0.0, 1.1])
def test_a_share_of_the_energy_out_of_range_is_refused(folder, energy):
    with pytest.raises(BudgetError, match="is no share"):
        goal(folder, has_data=False, energy=energy)


def test_ranks_that_some_site_cannot_have_are_refused(mixed, tmp_path):
    with pytest.raises(BudgetError, match="max_rank=3 for all sites, but one has rank 2"):
        goal(mixed, max_rank=3, uniform=True)
    assert goal(mixed, max_rank=3) == Goal(rank=3)
    whole = write_adapter_folder(tmp_path / "whole", SHAPES)
    folder = read_adapter(whole)
    from dataclasses import replace

    sites = (replace(folder.sites[0], has_directions=False), *folder.sites[1:])
    with pytest.raises(BudgetError, match=r"max_rank=3, but model.layers.0.self_attn.q_proj has rank 4 and cannot"):
        goal(replace(folder, sites=sites), max_rank=3)


@pytest.mark.parametrize(
    ("size", "n_bytes"),
    [("5000", 5000), ("5KB", 5000), ("5 kb", 5000), ("0.005MB", 5000), ("4KiB", 4096), ("0.004MiB", 4194)],
)
def test_units_of_sizes(tmp_path, size, n_bytes):
    shapes = {"layers.0.q": (32, 40, 60)}  # 3,200 numbers, 12,800 bytes and a header of 2 tensors
    folder = read_adapter(write_adapter_folder(tmp_path / "adapter", shapes))
    parameters = goal(folder, size=size).parameters
    assert parameters is not None and n_bytes - 600 <= 4 * parameters <= n_bytes
    with pytest.raises(BudgetError, match="leaves room for 0"):
        goal(folder, size="0.0001GB" if size == "none" else "100B")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_a_file_of_a_size_is_no_larger_and_hardly_smaller(tmp_path, dtype, share):
    shapes = {f"model.layers.{layer}.mlp.up_proj": (8, 100 + 10 * layer, 200) for layer in range(4)}
    folder = read_adapter(write_adapter_folder(tmp_path / "adapter", shapes, dtype))
    size = int(share * folder.weights.stat().st_size)
    parts = Parts.singular_(folder.sites)
    budget = goal(folder, size=str(size)).parameters
    family = Family.of(Units.of(parts, "direction"), score_named("energy")(Scoring(parts, folder)).values)
    gates = torch.zeros(len(parts))
    gates[family.units.parts_of(family.within(budget))] = 1
    result = write_pruned(folder.path, parts.selection(gates, "test", {}), tmp_path / "out")
    written = (tmp_path / "out" / "adapter_model.safetensors").stat().st_size
    direction = 330 * torch.finfo(dtype).bits // 8
    assert result.n_bytes == written and size - direction - 1500 <= written <= size
