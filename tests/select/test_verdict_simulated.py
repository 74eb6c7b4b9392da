"""Verdicts on adapters that lose exactly the margin: how often they are shown all the same."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest


@pytest.mark.slow
@pytest.mark.parametrize("won", [0.0, 0.01, 0.05])
@pytest.mark.parametrize(("n", "margin"), [(50, 0.02), (50, 0.08), (100, 0.03)])
def test_at_the_margin_answers_are_shown_in_5_per_cent_exactly(n, margin, won, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    bench = importlib.import_module("the_verdict_is_rarely_wrong")
    assert bench.share_shown_of(margin + won, won, n, margin) <= 0.05


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["loss", "loss, heavy tail", "ROUGE-L, 40 % change", "ROUGE-L, rare"])
@pytest.mark.parametrize("n", [50, 100, 300])
def test_at_the_margin_few_are_shown(kind, n, monkeypatch):
    """As in benchmarks/the_verdict_is_rarely_wrong.py: 5 %, and three standard errors."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    bench = importlib.import_module("the_verdict_is_rarely_wrong")
    draw, margin = bench.KINDS[kind]
    generator = np.random.default_rng([n, len(kind)])
    wrong = [bench.is_shown(draw(generator, n, np.ones(1)), margin) for _ in range(600)]
    assert np.mean(wrong) <= 0.05 + 3 * (0.05 * 0.95 / 600) ** 0.5
    flat = np.ones(4)
    wrong = [bench.is_wrong_in_sequence(draw(generator, n, flat), flat, margin) for _ in range(80)]
    assert np.mean(wrong) <= 0.05 + 3 * (0.05 * 0.95 / 80) ** 0.5
