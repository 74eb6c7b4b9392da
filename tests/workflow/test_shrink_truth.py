"""Planted truths: what is useful is known by name, shrink finds exactly that, and with scores reversed it does not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import lorazor.workflow.basis as basis_of_run
from lorazor.adapter.folder import read_adapter
from lorazor.selection import Selection
from lorazor.settings import By, Score, ShrinkSettings
from lorazor.workflow.shrink import shrink
from tests.workflow.planted import Planted, change, plant

USEFUL = {
    "site": {"model.layers.1.self_attn.o_proj"},  # of several, one may have negative credit on answers of all
    "group": {f"model.layers.2.self_attn.{one}_proj" for one in "qkv"},
    "kind": {f"model.layers.{layer}.mlp.down_proj" for layer in range(4)},
    "layer": {"model.layers.1", "model.layers.3"},
    "prefix": {"model.layers.0", "model.layers.1"},
    "window": {"model.layers.1", "model.layers.2"},
}
DIRECTIONS = {"model.layers.3.self_attn.o_proj": 2, "model.layers.2.mlp.down_proj": 1}


def is_useful(site: str, by: str) -> bool:
    return any(site == one or site.startswith(f"{one}.") for one in USEFUL[by])


@pytest.fixture(scope="module")
def planted(tiny, tmp_path_factory):
    """By unit: the adapter of the tests with B = 0 but for what is useful, and its own answers."""
    made: dict[str, Planted] = {}

    def make(by: str) -> Planted:
        if by not in made:
            root = tmp_path_factory.mktemp(by)
            if by == "direction":
                # rank 2 and rank 1, hidden by a rotation of the directions as they were trained
                def edit(site, A, B):
                    n = DIRECTIONS.get(site, 0)
                    turn, _ = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(3)))
                    mask = (torch.arange(4) < n).float()
                    return turn @ A, 2 * (B * mask) @ turn.T
            else:

                def edit(site, A, B):
                    return A, 2 * B * is_useful(site, by)

            made[by] = plant(tiny.base, change(tiny.adapter, root / "adapter", edit), root)
        return made[by]

    return make


def budget_of(adapter: Path, by: str) -> int:
    sites = {site.name: site for site in read_adapter(adapter).sites}
    if by == "direction":
        return sum(n * sites[name].n_parameters // sites[name].rank for name, n in DIRECTIONS.items())
    return sum(site.n_parameters for name, site in sites.items() if is_useful(name, by))


def ranks_kept(adapter: Path, data: str | None, out: Path, by: By, score: Score, budget: int) -> dict[str, int]:
    """By name, from the files that were written."""
    settings = ShrinkSettings(params=budget, by=by, score=score, points=2)
    shrink(adapter, data, out=out, settings=settings)
    kept = {site.name: site.kept_rank for site in Selection.load(out / "selection.json").kept}
    assert {site.name: site.rank for site in read_adapter(out / "adapter").sites} == kept
    return kept


def truth(adapter: Path, by: str) -> dict[str, int]:
    if by == "direction":
        return dict(DIRECTIONS)
    return {site.name: site.rank for site in read_adapter(adapter).sites if is_useful(site.name, by)}


_FAST = (("direction", "fisher"), ("direction", "balanced"), ("site", "credit"), ("site", "balanced"))
CASES = [
    *((by, score) for by in ("direction", *USEFUL) for score in ("credit", "energy")),
    *(("direction", score) for score in ("fisher", "balanced")),
    *(("site", score) for score in ("fisher", "balanced")),
]


@pytest.mark.parametrize(
    ("by", "score"),
    [pytest.param(*case, marks=[] if case in _FAST else pytest.mark.slow) for case in CASES],
)
def test_exactly_what_is_useful_stays(planted, tmp_path, monkeypatch, by, score):
    one, budget = planted(by), budget_of(planted(by).adapter, by)
    assert ranks_kept(one.adapter, one.data, tmp_path / "run", by, score, budget) == truth(one.adapter, by)
    if by == "prefix":
        return  # no score enters: the first layers stay
    forwards = basis_of_run.score_named

    def backwards(name):
        def score(of):
            found = forwards(name)(of)
            values = found.values.max() - np.asarray(found.values) + 1e-6
            return basis_of_run.PartScores(found.parts, values)

        return score

    monkeypatch.setattr(basis_of_run, "score_named", backwards)
    assert ranks_kept(one.adapter, one.data, tmp_path / "reversed", by, score, budget) != truth(one.adapter, by)


def test_what_does_nothing_takes_no_room_that_is_left(planted, tmp_path):
    """Scores of directions that are zero are rounding, and rounding is above 0 half of the time."""
    one, budget = planted("direction"), budget_of(planted("direction").adapter, "direction")
    kept = ranks_kept(one.adapter, one.data, tmp_path / "run", "direction", "fisher", 3 * budget)
    assert kept == truth(one.adapter, "direction")


@pytest.mark.slow
@pytest.mark.parametrize("by", ["direction", "site", "kind", "layer", "window"])
def test_without_data_the_weights_find_it(planted, tmp_path, by):
    one = planted(by)
    found = ranks_kept(one.adapter, None, tmp_path / "run", by, "energy", budget_of(one.adapter, by))
    assert found == truth(one.adapter, by)


def test_energy_keeps_the_whole_of_it_and_no_more(planted, tmp_path):
    one = planted("direction")
    shrink(one.adapter, out=tmp_path / "run", settings=ShrinkSettings(energy=1.0))
    kept = {site.name: site.kept_rank for site in Selection.load(tmp_path / "run" / "selection.json").kept}
    assert kept == DIRECTIONS


@pytest.mark.slow
def test_a_margin_keeps_what_is_useful_and_drops_harm(tiny, planted, tmp_path):
    """What else is in the adapter does harm: within a margin, the useful site alone is the smallest that passes."""
    live, harmful = "model.layers.1.self_attn.o_proj", "model.layers.0.mlp.up_proj"

    def edit(site, A, B):
        return A, (4.0 * (site == live) + 0.2 * (site == harmful)) * B

    useful = change(tiny.adapter, tmp_path / "useful", lambda site, A, B: (A, 4.0 * (site == live) * B))
    one = plant(tiny.base, useful, tmp_path)
    both = change(tiny.adapter, tmp_path / "both", edit)
    settings = ShrinkSettings(margin="40%", by="site", points=2)
    result = shrink(both, one.data, out=tmp_path / "run", confirm=one.held_out, settings=settings)
    kept = {site.name for site in Selection.load(tmp_path / "run" / "selection.json").kept}
    assert kept == {live}
    assert result.verdict is not None and result.verdict.lost < result.verdict.margin
