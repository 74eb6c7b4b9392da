"""Examples that were measured in runs, to draw samples from whose truth is known."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from lorazor.measure.metrics import teacher_forced_scores
from lorazor.measure.stats import Scores

Array = NDArray[np.float64]
Draw = Callable[[Generator, int, Array], Scores]
"""Scores of adapters that truly lose (n_adapters,) margins each, then of the full adapter and the base model."""

BASE = "base"


def measured_draws(file: Path, share: float, amount: float) -> dict[str, Draw]:
    """Draws from the rows of a file, by what they are called: the run, and the smaller adapter.

    Args:
        file: losses of a shrink or of an eval with the base model, or `predictions.jsonl` of an eval with ROUGE-L; the
            first adapter in it is the full one.
        share: the margin of losses, of the gain.
        amount: the margin of ROUGE-L.
    """
    is_text = file.name == "predictions.jsonl"
    found = _columns(file, "rougeL" if is_text else "nll_nats")
    base, full = found.pop(BASE, None), found.pop(next(one for one in found if one != BASE))
    if is_text:
        return {f"ROUGE-L, {_name(file, one)}": measured_texts(own, full, amount) for one, own in found.items()}
    assert base is not None
    tokens = next(iter(_columns(file, "n_tokens").values()))
    return {f"loss, {_name(file, one)}": measured_losses(own, full, base, tokens, share) for one, own in found.items()}


def measured_answers(file: Path) -> dict[str, tuple[float, float]]:
    """Shares of labels that a smaller adapter wins, and that it loses more than it wins, where the file has labels."""
    rows = {} if file.name == "predictions.jsonl" else _columns(file, "n_correct")
    if not rows or next(iter(_columns(file, "n_tokens").values())).max() > 1:
        return {}
    rows.pop(BASE, None)
    full, found = rows.pop(next(iter(rows))), {}
    for name, own in rows.items():
        won, lost = float((own > full).mean()), float((own < full).mean())
        if lost > won:
            found[f"accuracy, {_name(file, name)}"] = (won, lost - won)
    return found


def measured_losses(smaller: Array, full: Array, base: Array, tokens: Array, share: float) -> Draw:
    """Nats of examples, summed over their answers; all answer tokens are moved alike."""
    gain, differs = (float((one - full).sum() / tokens.sum()) for one in (base, smaller))

    def draw(generator: Generator, n: int, lost: Array) -> Scores:
        drawn = generator.integers(0, len(tokens), n)
        moved = smaller[drawn] + (share * gain * lost[:, None] - differs) * tokens[drawn]
        nats = np.stack([*moved, full[drawn], base[drawn]])
        return teacher_forced_scores("loss", nats, tokens[drawn], np.zeros_like(nats))

    return draw


def measured_texts(smaller: Array, full: Array, amount: float) -> Draw:
    """ROUGE-L of answers that were written; all that differ are moved alike."""
    worse = full - smaller
    changes = worse != 0

    def draw(generator: Generator, n: int, lost: Array) -> Scores:
        drawn = generator.integers(0, len(full), n)
        shift = (amount * lost[:, None] - worse.mean()) / changes.mean()
        moved = full[drawn] - np.where(changes[drawn], worse[drawn] + shift, 0.0)
        return rouge(np.stack([*moved, full[drawn], full[drawn]]))

    return draw


def rouge(values: Array) -> Scores:
    """ROUGE-L as scores: (n_variants, n_examples) in percent."""
    return Scores(
        "rougeL", True, np.stack([values, np.ones_like(values)], -1), lambda sums: sums[..., 0] / sums[..., 1]
    )


def _name(file: Path, adapter: str) -> str:
    return f"{file.parent.name}, {Path(adapter).parent.name or adapter}"


def _columns(file: Path, name: str) -> dict[str, Array]:
    """One number of every example, by adapter, in the order of the file; examples in one order."""
    rows: dict[str, dict[int, Any]] = defaultdict(dict)
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rows[row["adapter"]][row["example"]] = row[name]
    return {adapter: np.array([own[one] for one in sorted(own)], dtype=float) for adapter, own in rows.items()}
