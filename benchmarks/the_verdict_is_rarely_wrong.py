"""The verdict is rarely wrong: an adapter that is worse by the margin or more is called "shown" in at most 5 % of runs.

Truths are drawn again and again at the edge, where the smaller adapter loses exactly the margin, and judged by the code
that `lorazor shrink` uses. The last columns are fixed sequences of a proposal and three larger adapters that all lose
the margin (flat), or less and less from 1.2 margins to none (falling): from the largest down to the proposal, as
`shrink` does, and for comparison the proposal first, and from the largest down where it fails.

    loss      share of the gain, differences per example skewed to worse (log-normal), answers of 5 to 40 tokens
    accuracy  only losses (one way), or losses and wins (two ways)
    ROUGE-L   most texts the same, some better or worse by a skewed amount

Also printed, and harder: losses with a tail so heavy that no bound from so few examples keeps its promise (log-normal
of skewness 6), and texts of which one in a hundred breaks (rare), which the others cannot know of.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from lorazor.measure.metrics import teacher_forced_scores
from lorazor.measure.stats import Scores
from lorazor.select.verdict import Margin, Verdict, judge, last_shown

Array = NDArray[np.float64]
Draw = Callable[[Generator, int, Array], Scores]
"""Scores of adapters that truly lose (n_adapters,) margins each, then of the full adapter and the base model."""

SIZES = (50, 100, 300)
SHARE, ACCURACY, ROUGE = 0.02, 0.08, 2.0
GAIN = 1.3
N_LARGER = 3


def losses(sigma: float) -> Draw:
    """Nats: a gain over the base that varies, and differences per token that are log-normal, skewed to worse."""

    def draw(generator: Generator, n: int, lost: Array) -> Scores:
        tokens = generator.integers(5, 41, n)
        full = generator.gamma(4, 0.3, n)
        base = full + GAIN * generator.lognormal(-0.125, 0.5, n)
        common = generator.lognormal(0, sigma, n)
        own = generator.lognormal(0, sigma, (len(lost), n))
        noise = 0.7 * common + 0.3 * own - np.exp(sigma**2 / 2)  # of mean 0, correlated between adapters
        smaller = full + SHARE * GAIN * lost[:, None] + 0.05 * noise
        nats = np.stack([*smaller, full, base]) * tokens
        return teacher_forced_scores("loss", nats, tokens, np.zeros_like(nats))

    return draw


def answers(p_won: float) -> Draw:
    """Right or wrong; of each adapter some are lost and `p_won` are won, on a draw that adapters share in part."""

    def draw(generator: Generator, n: int, lost: Array) -> Scores:
        full = generator.random(n) < 0.5  # lost where right, won where wrong
        where = _shared(generator, len(lost), n)
        changed = np.where(full, where < 2 * (ACCURACY * lost[:, None] + p_won), where < 2 * p_won)
        right = np.stack([*(full ^ changed), full, full]).astype(float)
        return teacher_forced_scores("accuracy", np.ones_like(right), np.ones(n), right)

    return draw


def texts(p_changed: float, p_broken: float = 0.0) -> Draw:
    """ROUGE-L: texts that change gain or lose a skewed amount; a broken one loses all it has."""

    def draw(generator: Generator, n: int, lost: Array) -> Scores:
        full = 100 * generator.beta(5, 4, n)
        where = _shared(generator, len(lost), n)
        amount = 12 * (generator.exponential(1.0, (len(lost), n)) - 1)  # of mean 0
        shift = (ROUGE * lost[:, None] - 100 * 5 / 9 * p_broken) / p_changed
        worse = np.where(where < p_changed, amount + shift, 0.0)
        worse = np.where(where > 1 - p_broken, full, worse)
        values = np.stack([*(full - worse), full, full])
        return Scores("rougeL", True, np.stack([values, np.ones_like(values)], -1), lambda s: s[..., 0] / s[..., 1])

    return draw


def _shared(generator: Generator, n_adapters: int, n: int) -> Array:
    """(n_adapters, n) uniform numbers, of which adapters share about two in three."""
    is_shared = generator.random((n_adapters, n)) < 0.65
    return np.where(is_shared, generator.random(n), generator.random((n_adapters, n)))


KINDS: dict[str, tuple[Draw, Margin]] = {
    "loss": (losses(0.7), Margin("loss", share=SHARE)),
    "loss, heavy tail": (losses(1.0), Margin("loss", share=SHARE)),
    "accuracy, one way": (answers(0.0), Margin("accuracy", amount=ACCURACY)),
    "accuracy, two ways": (answers(0.05), Margin("accuracy", amount=ACCURACY)),
    "ROUGE-L, 40 % change": (texts(0.4), Margin("rougeL", amount=ROUGE)),
    "ROUGE-L, 15 % change": (texts(0.15), Margin("rougeL", amount=ROUGE)),
    "ROUGE-L, rare": (texts(0.15, 0.01), Margin("rougeL", amount=ROUGE)),
}


def verdict_on(scores: Scores, index: int, margin: Margin) -> Verdict:
    """The verdict of one adapter of several."""
    n = scores.n_variants - 2
    rows = [index, n] if margin.share is None else [index, n, n + 1]
    return judge(dataclasses.replace(scores, statistics=scores.statistics[rows]), margin, range(scores.n_examples))


def is_wrong_in_sequence(scores: Scores, lost: Array, margin: Margin) -> bool:
    """Whether `last_shown`, from the largest down to the proposal, ends in an adapter that loses the margin or more."""
    found, _ = last_shown(range(len(lost))[::-1], lambda index: verdict_on(scores, index, margin))
    return found is not None and bool(lost[found] >= 1)


def is_wrong_when_proposed_first(scores: Scores, lost: Array, margin: Margin) -> bool:
    """The same with the sequence of before: the proposal, and where it fails, from nearly full down."""
    if verdict_on(scores, 0, margin).outcome == "shown":
        return bool(lost[0] >= 1)
    best = None
    for index in range(len(lost) - 1, 0, -1):
        if verdict_on(scores, index, margin).outcome != "shown":
            break
        best = index
    return best is not None and bool(lost[best] >= 1)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=250, help="of single verdicts; of whole sequences a fifth")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    flat, falling = np.ones(N_LARGER + 1), np.linspace(1.2, 0.0, N_LARGER + 1)
    print(f"wrong 'shown' at the margin, % of {options.runs} runs (two standard errors: {_error(options.runs):.1f})")
    print("power: % shown where nothing is lost; sequences: % of a fifth of the runs")
    print(f"{'':24}{'n':>5}{'wrong':>8}{'power':>8} | {'sequence: flat':>14}{'falling':>9} | {'proposal first':>14}")
    for number, (kind, (draw, margin)) in enumerate(KINDS.items()):
        for n in SIZES:
            generator = np.random.default_rng([options.seed, number, n])
            row = _row(generator, draw, margin, n, options.runs, flat, falling)
            wrong, power, *sequences = (100 * share for share in row)
            print(f"{kind:24}{n:>5}{wrong:>8.1f}{power:>8.1f} | {sequences[0]:>14.1f}{sequences[1]:>9.1f} "
                  f"| {sequences[2]:>14.1f}")  # fmt: skip


def _row(
    generator: Generator, draw: Draw, margin: Margin, n: int, n_runs: int, flat: Array, falling: Array
) -> tuple[float, ...]:
    n_sequences = n_runs // 5

    def share(lost: float) -> float:
        drawn = (draw(generator, n, np.array([lost])) for _ in range(n_runs))
        return float(np.mean([verdict_on(scores, 0, margin).outcome == "shown" for scores in drawn]))

    def sequences(lost: Array, is_wrong: Callable[[Scores, Array, Margin], bool]) -> float:
        return float(np.mean([is_wrong(draw(generator, n, lost), lost, margin) for _ in range(n_sequences)]))

    return (
        share(1.0),
        share(0.0),
        sequences(flat, is_wrong_in_sequence),
        sequences(falling, is_wrong_in_sequence),
        sequences(flat, is_wrong_when_proposed_first),
    )


def _error(n_runs: int) -> float:
    return 200 * (0.05 * 0.95 / n_runs) ** 0.5


if __name__ == "__main__":
    main()
