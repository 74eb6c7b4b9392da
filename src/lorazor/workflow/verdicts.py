"""Verdicts on variants that a meter measures, and what the examples at hand can decide."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from lorazor.data.examples import Example, asked
from lorazor.errors import SettingsError
from lorazor.measure.meter import Meter, Variant
from lorazor.measure.metrics import metric_named
from lorazor.select.verdict import (
    RIGHT_OR_WRONG,
    Margin,
    Verdict,
    judge,
    largest_difference,
    least_examples,
    least_margin,
)

_TYPICAL = {"gain": (0.02, 40), "text": (0.01, 1500), "right or wrong": (0.01, 3000)}
"""A margin, and how many different prompts it typically takes: as a share of the gain in loss; of the largest value of
a metric of texts; of answers that are right or wrong. Four times as many show half of it."""


def judged(
    meter: Meter,
    variants: Sequence[Variant],
    margin: Margin,
    of: str,
    seed: int,
    full: Variant | None = None,
    base: Variant | None = None,
) -> list[Verdict]:
    """Measure smaller adapters and compare each with the full one.

    Args:
        meter: measures what is missing.
        variants: the smaller adapters.
        margin: how much worse they may be.
        of: name of the set of examples.
        seed: of the bootstrap.
        full: the full adapter; all of the one on the model if left out.
        base: the base model, likewise; measured where the margin is a share of the gain.
    Returns:
        A verdict on each.
    """
    others = [full or meter.full] if margin.share is None else [full or meter.full, base or meter.base]
    scores, n = meter.scores(margin.metric, [*variants, *others], of), len(variants)
    prompts = [asked(example) for example in meter.examples(of)]
    trios = [[place, *range(n, n + len(others))] for place in range(n)]
    return [
        judge(dataclasses.replace(scores, statistics=scores.statistics[trio]), margin, prompts, seed) for trio in trios
    ]


def check_gains(meter: Meter, margin: Margin | None, of: str) -> None:
    """Refuse a share of a gain that there is not, before a long search; what is measured for it is needed later anyway.

    Raises:
        MeasureError: the adapter is no better than its base.
    """
    if margin is not None and margin.share is not None and meter.examples(of):
        judged(meter, [meter.full], margin, of, seed=0)


def check_can_decide(margin: Margin | None, examples: Sequence[Example], option: str = "--confirm") -> None:
    """Refuse a margin that examples could never show, whatever they say.

    Args:
        margin: how much worse an adapter may be; None refuses nothing.
        examples: to judge on, or to choose on; none of them refuse nothing.
        option: what the command line calls them.
    Raises:
        SettingsError: fewer than 2 different prompts; of answers that are right or wrong, too few for the margin: the
            message says how many it takes.
    """
    if margin is None or not examples:
        return
    n_prompts = len({asked(example) for example in examples})
    if n_prompts < 2:
        raise SettingsError(f"{n_prompts} prompt in {option}: no bound can be had. Pass examples with other prompts.")
    if margin.amount is None:
        return
    least = least_margin(margin.metric, n_prompts)
    if least is not None and margin.amount <= least:
        needed = least_examples(margin.amount, largest_difference(margin.metric))
        raise SettingsError(
            f"margin={margin.metric}={margin.amount:g} cannot be shown on the {n_prompts} different prompts of "
            f"{option}, even if no answer changes: the bound would be {least:.3g}. Pass {needed:,} or more, or a wider "
            "margin; losses (--margin 2%) take fewer."
        )


def what_can_be_decided(margin: Margin, sets: Mapping[str, Sequence[Example]]) -> str | None:
    """What examples typically can decide, in a sentence, so that nobody waits for a verdict that cannot come.

    Losses are known no better before they are measured; what is seen later has its own number of examples.

    Args:
        margin: how much worse an adapter may be.
        sets: examples by what they are called.
    Returns:
        None where nothing is known beforehand, as for an amount of loss.
    """
    if margin.share is not None:
        kind = "gain"
    elif margin.metric in RIGHT_OR_WRONG:
        kind = "right or wrong"
    elif metric_named(margin.metric).needs_text:
        kind = "text"
    else:
        return None
    (share, n_typical), whole = _TYPICAL[kind], 1.0 if kind == "gain" else largest_difference(margin.metric)
    wanted = margin.amount if margin.share is None else margin.share
    assert wanted is not None
    numbers = {name: len({asked(example) for example in own}) for name, own in sets.items() if own}
    decided = {name: whole * share * math.sqrt(n_typical / n) for name, n in numbers.items()}
    unit = "of the gain in loss" if kind == "gain" else f"of {margin.metric}"
    said = {name: f"{100 * one:.2g} %" if kind == "gain" else f"{one:.2g}" for name, one in decided.items()}
    parts = ", ".join(f"{n:,} {name} prompts about {said[name]}" for name, n in numbers.items())
    sentence = f"What can typically be decided: {parts} {unit}; the margin is {margin}."
    if all(wanted >= one for one in decided.values()):
        return sentence
    n_needed = math.ceil(n_typical * (whole * share / wanted) ** 2)
    return f"{sentence} It may stay undecided: that takes about {n_needed:,}."
