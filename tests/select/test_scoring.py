"""Scores of parts: sums and errors by hand, and credit against finite differences through stock PEFT."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from lorazor.adapter.folder import read_adapter
from lorazor.adapter.parts import Parts
from lorazor.adapter.sites import Site, find_sites
from lorazor.data.batches import Batch
from lorazor.errors import SettingsError
from lorazor.select.scoring import PartScores, Scoring, score_named
from lorazor.select.search import Family, Units
from tests.tiny_models import tiny_inputs, tiny_peft_model, write_adapter_folder

SITES = tuple(
    Site(f"layers.{layer}.{kind}", "layers", layer, kind, rank, 1.0, rank * size)
    for layer in range(3)
    for kind, rank, size in (("q", 2, 10), ("up", 3, 40))
)
PARTS = Parts((*SITES, Site("embed", None, None, "embed", 4, 1.0, 60, has_directions=False)))


def scoring(parts: Parts = PARTS, **more) -> Scoring:
    return Scoring(parts, folder=SimpleNamespace(), **more)  # type: ignore[arg-type]


def test_a_site_has_the_sum_of_its_parts_and_its_standard_error():
    generator = np.random.default_rng(0)
    credits, n_tokens = generator.normal(size=(6, len(PARTS))), generator.integers(1, 9, 6).astype(float)
    rows = PartScores(PARTS, credits.sum(0) / n_tokens.sum(), credits, n_tokens).by_site()
    start = 0
    for row, site in zip(rows, PARTS.sites, strict=True):
        of_site = credits[:, start : start + site.n_gates].sum(axis=1)
        start += site.n_gates
        mean = of_site.sum() / n_tokens.sum()
        squares = sum((value - mean * n) ** 2 for value, n in zip(of_site, n_tokens, strict=True))
        assert row["score"] == pytest.approx(mean)
        assert row["standard_error"] == pytest.approx((6 / 5 * squares) ** 0.5 / n_tokens.sum())
        assert row["score_per_parameter"] == pytest.approx(mean / site.n_parameters)
        assert (row["site"], row["layer"], row["stack"], row["kind"]) == (site.name, site.layer, site.stack, site.kind)


def test_without_examples_there_is_no_standard_error():
    values = np.arange(float(len(PARTS)))
    assert {row["standard_error"] for row in PartScores(PARTS, values).by_site()} == {None}
    one = PartScores(PARTS, values, values[None], np.array([3.0]))
    assert {row["standard_error"] for row in one.by_site()} == {None}


def order(name: str, by="site", **more) -> list[str]:
    """Labels of units, the best first."""
    units = Units.of(PARTS, by)
    candidates = Family.of(units, score_named(name)(scoring(**more)).values).candidates
    entered = [set(larger) - set(smaller) for smaller, larger in zip(((), *candidates), candidates, strict=False)]
    return [units.movable[unit].label for (unit,) in entered]


def test_controls_know_the_layer_or_nothing():
    assert order("first-layers", "layer")[-2:] == ["layers.1", "layers.2"]
    assert order("last-layers", "layer")[:2] == ["layers.2", "layers.1"]
    once, again, other = (order("random", seed=seed) for seed in (0, 0, 1))
    assert once == again != other and len(once) == len(PARTS.sites)


def test_random_prefers_no_site_by_its_size():
    first = [order("random", "direction", seed=seed)[0] for seed in range(400)]
    share = sum("up" in name for name in first) / 400
    assert share == pytest.approx(
        9 / 16, abs=0.1
    )  # directions of "up" among all parts, though each has 4 times as many


def test_balanced_is_by_the_names_of_the_sites():
    sigma2 = {site.name: torch.arange(site.rank, dtype=torch.float32) for site in reversed(SITES)}
    found = score_named("balanced")(scoring(Parts(SITES), sigma2=sigma2))
    np.testing.assert_array_equal(found.values, [0, 1, 0, 1, 2] * 3)


def test_energy_is_that_of_the_singular_values(tmp_path):
    shapes = {"model.layers.0.q_proj": (3, 8, 6), "model.layers.1.q_proj": (2, 8, 6)}
    folder = read_adapter(
        write_adapter_folder(tmp_path / "adapter", shapes, lora_alpha=6, rank_pattern={"1.q_proj": 2})
    )
    found = score_named("energy")(Scoring(Parts(folder.sites), folder))
    tensors, expected = load_file(folder.weights), []
    for name, (rank, _, _) in shapes.items():
        A, B = (tensors[f"base_model.model.{name}.lora_{part}.weight"].astype(float) for part in "AB")
        expected += [(6 / rank * sigma) ** 2 for sigma in np.linalg.svd(B @ A, compute_uv=False)[:rank]]
    np.testing.assert_allclose(found.values, expected, rtol=1e-4)


def test_an_unknown_score_is_refused():
    with pytest.raises(SettingsError, match="score='taylor' is unknown. Pass one of credit, balanced, fisher, energy"):
        score_named("taylor")


def test_the_credit_of_a_site_is_what_peft_says_when_its_scale_moves():
    """Against the integral of finite differences along `set_scale`, all sites moving together."""
    model = tiny_peft_model("gpt2", n_layers=2, rank=3).double()
    sites = find_sites(model)
    inputs = tiny_inputs("gpt2", rows=3, tokens=6)
    targets = inputs["input_ids"].clone()
    targets[:, :2] = -100
    batch = Batch((0, 1, 2), inputs, targets)
    parts = Parts(tuple(sites))
    found = score_named("credit")(Scoring(parts, None, model, [batch], points=8))  # type: ignore[arg-type]

    def loss(scales: list[float]) -> float:
        for site, scale in zip(sites, scales, strict=True):
            site.module.set_scale(site.adapter, scale)
        with torch.no_grad():
            logits = model(**inputs).logits
        for site in sites:
            site.module.set_scale(site.adapter, 1.0)
        return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()))

    nodes, weights = np.polynomial.legendre.leggauss(8)
    rows = found.by_site()
    for index in (0, 5, len(sites) - 1):
        integral = 0.0
        for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
            up, down = ([node] * len(sites) for _ in range(2))
            up[index], down[index] = node + 1e-3, node - 1e-3
            integral -= weight * (loss(up) - loss(down)) / 2e-3
        assert rows[index]["score"] == pytest.approx(integral, rel=1e-4, abs=1e-7)
    assert sum(row["score"] for row in rows) == pytest.approx(
        loss([0.0] * len(sites)) - loss([1.0] * len(sites)), rel=1e-2
    )
