"""The verdict is rarely wrong: an adapter that is worse by the margin is called "shown" in at most 5 % of runs.

Truths are drawn again and again at the edge, where the smaller adapter loses exactly the margin, and judged by the code
that `lorazor shrink` uses; and where it loses half of it and nothing, for the power. Verdicts on answers that are right
or wrong are counted exactly, over all outcomes; of the others as many samples are drawn as --runs says. Of these,
Student's t decides most: the bound is never inside of Student's, so that only what that shows is judged.

    loss      share of the gain, differences per example skewed to worse (log-normal), answers of 5 to 40 tokens
    accuracy  only losses (one way), or losses and wins (two ways)
    ROUGE-L   most texts the same, some better or worse by a skewed amount; in "rare" one in a hundred breaks

Examples that were measured are drawn from as well where files are given: the losses of a shrink or of an eval with the
base model, the predictions of an eval by ROUGE-L, the full adapter first. They are drawn with replacement, and what is
lost is moved to what is to be true by the same amount on every token, or on every text that changes; of labels, answers
flip as often as there.

    python benchmarks/the_verdict_is_rarely_wrong.py [--measured FILE ...] [--runs 4000]
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from _machine import record, say
from _measured_examples import Array, Draw, measured_answers, measured_draws, rouge
from numpy.random import Generator
from scipy import stats

from lorazor.errors import MeasureError
from lorazor.measure.metrics import teacher_forced_scores
from lorazor.measure.stats import Scores
from lorazor.select.verdict import Margin, Verdict, judge, last_shown

SIZES = (50, 100, 300)
SHARE, ACCURACY, ROUGE = 0.02, 0.08, 2.0
GAIN = 1.3
TRUTHS = {"wrong": 1.0, "power at half the margin": 0.5, "power at none": 0.0}


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


def texts(p_changed: float, p_broken: float = 0.0) -> Draw:
    """ROUGE-L: texts that change gain or lose a skewed amount; a broken one loses all it has."""

    def draw(generator: Generator, n: int, lost: Array) -> Scores:
        full = 100 * generator.beta(5, 4, n)
        is_shared = generator.random((len(lost), n)) < 0.65  # adapters share about two changes in three
        where = np.where(is_shared, generator.random(n), generator.random((len(lost), n)))
        amount = 12 * (generator.exponential(1.0, (len(lost), n)) - 1)  # of mean 0
        shift = (ROUGE * lost[:, None] - 100 * 5 / 9 * p_broken) / p_changed
        worse = np.where(where < p_changed, amount + shift, 0.0)
        worse = np.where(where > 1 - p_broken, full, worse)
        return rouge(np.stack([*(full - worse), full, full]))

    return draw


KINDS: dict[str, tuple[Draw, Margin]] = {
    "loss": (losses(0.7), Margin("loss", share=SHARE)),
    "loss, heavy tail": (losses(1.0), Margin("loss", share=SHARE)),
    "ROUGE-L, 40 % change": (texts(0.4), Margin("rougeL", amount=ROUGE)),
    "ROUGE-L, 15 % change": (texts(0.15), Margin("rougeL", amount=ROUGE)),
    "ROUGE-L, rare": (texts(0.15, 0.01), Margin("rougeL", amount=ROUGE)),
}
WON = {"accuracy, one way": 0.0, "accuracy, two ways": 0.05}
"""Shares of answers that only the smaller adapter gets right."""


def verdict_on(scores: Scores, index: int, margin: Margin) -> Verdict:
    """The verdict of one adapter of several."""
    n = scores.n_variants - 2
    rows = [index, n] if margin.share is None else [index, n, n + 1]
    return judge(dataclasses.replace(scores, statistics=scores.statistics[rows]), margin, range(scores.n_examples))


def is_wrong_in_sequence(scores: Scores, lost: Array, margin: Margin) -> bool:
    """Whether `last_shown`, from the largest down to the proposal, ends in an adapter that loses the margin or more."""
    found, _ = last_shown(range(len(lost))[::-1], lambda index: verdict_on(scores, index, margin))
    return found is not None and bool(lost[found] >= 1)


def is_shown(scores: Scores, margin: Margin) -> bool:
    """Whether the first adapter is shown to be within the margin."""
    (smaller, full, base), below = scores.statistics[[0, -2, -1], :, 0], scores.statistics[0, :, 1]
    sign = 1.0 if scores.higher_is_better else -1.0
    per_unit = below * margin.amount if margin.share is None else margin.share * sign * (full - base)
    excess, n = sign * (full - smaller) - per_unit, len(below)
    estimate = excess.sum() / below.sum()
    error = np.std(excess - estimate * below) * n / (n - 1) ** 0.5 / below.sum()
    try:
        return bool(estimate + student(n) * error < 0) and verdict_on(scores, 0, margin).outcome == "shown"
    except MeasureError:  # the adapter gains nothing in this sample: refused
        return False


@cache
def student(n: int) -> float:
    """Student's quantile, a little lower, so that rounding skips nothing."""
    return float(stats.t.ppf(0.95, n - 1)) * (1 - 1e-9)


@cache
def is_shown_of(n_lost: int, n_won: int, n: int, amount: float) -> bool:
    """The same for so many answers that are lost and won."""
    right = np.zeros((2, n))
    right[1, :n_lost] = right[0, n_lost : n_lost + n_won] = 1.0
    scores = teacher_forced_scores("accuracy", np.ones_like(right), np.ones(n), right)
    return judge(scores, Margin("accuracy", amount=amount), range(n)).outcome == "shown"


def share_shown_of(p_lost: float, p_won: float, n: int, amount: float) -> float:
    """Probability of "shown" where answers are lost and won with these probabilities."""
    outcomes = [(b, c) for b in range(n + 1) for c in range(n + 1 - b)]
    table = [[b, c, n - b - c] for b, c in outcomes]
    chances = stats.multinomial.pmf(table, n, [p_lost, p_won, 1 - p_lost - p_won])
    likely = ((one, chance) for one, chance in zip(outcomes, chances, strict=True) if chance > 1e-7)
    return float(sum(chance for (b, c), chance in likely if is_shown_of(b, c, n, amount)))


def cells(arguments: argparse.Namespace) -> dict[str, Callable[[int, float], tuple[float, float]]]:
    """By kind: from n and the margins that are lost to the share that is shown, and an upper 97.5 % bound of it."""
    generator, n_power = np.random.default_rng(arguments.seed), max(1, arguments.runs // 20)

    def simulated(draw: Draw, margin: Margin) -> Callable[[int, float], tuple[float, float]]:
        def share(n: int, lost: float) -> tuple[float, float]:
            n_runs = arguments.runs if lost == 1 else n_power
            n_shown = sum(is_shown(draw(generator, n, np.array([lost])), margin) for _ in range(n_runs))
            return n_shown / n_runs, float(stats.beta.ppf(0.975, n_shown + 1, n_runs - n_shown))

        return share

    def exact(won: float, amount: float) -> Callable[[int, float], tuple[float, float]]:
        return lambda n, lost: (share_shown_of(won + lost * amount, won, n, amount),) * 2

    found = {kind: simulated(*of) for kind, of in KINDS.items()}
    found |= {kind: exact(won, ACCURACY) for kind, won in WON.items()}
    for file in arguments.measured:
        draws = measured_draws(file, SHARE, ROUGE)
        margin = Margin("rougeL", amount=ROUGE) if file.name == "predictions.jsonl" else Margin("loss", share=SHARE)
        found |= {kind: simulated(draw, margin) for kind, draw in draws.items()}
        found |= {kind: exact(won, lost) for kind, (won, lost) in measured_answers(file).items()}
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--measured", type=Path, nargs="*", default=[], help="losses or predictions of a run")
    parser.add_argument("--runs", type=int, default=4000, help="samples at the margin; for the power a twentieth")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="also write the result to this file")
    arguments = parser.parse_args()
    rows, holds = [], True
    say(f"{'':44}{'n':>5}" + "".join(f"{name:>26}" for name in TRUTHS))
    for kind, share in cells(arguments).items():
        for n in SIZES:
            found = {name: share(n, lost) for name, lost in TRUTHS.items()}
            holds = holds and found["wrong"][0] <= 0.05
            rows.append({"kind": kind, "n": n} | {name: value for name, (value, _) in found.items()})
            rows[-1]["wrong at most"] = found["wrong"][1]
            say(f"{kind:44}{n:>5}" + "".join(f"{100 * value:>25.1f}%" for value, _ in found.values()))
    record({"holds": holds, "runs": arguments.runs, "rows": rows}, arguments.out)
    if not holds:
        raise SystemExit("A cell is wrong in more than 5 % of samples.")


if __name__ == "__main__":
    main()
