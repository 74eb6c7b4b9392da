"""Verdicts on variants that a meter measures, and what the examples at hand can decide."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from lorazor.data.examples import Example, asked
from lorazor.errors import SettingsError
from lorazor.measure.meter import Meter, Variant
from lorazor.select.verdict import Margin, Verdict, judge, largest_difference, least_examples, least_margin


def judged(
    meter: Meter, variants: Sequence[Variant], full: Variant, base: Variant, margin: Margin, of: str, seed: int
) -> list[Verdict]:
    """Measure smaller adapters and compare each with the full one.

    Args:
        meter: measures what is missing.
        variants: the smaller adapters.
        full: the full adapter.
        base: the base model; measured where the margin is a share of the gain.
        margin: how much worse they may be.
        of: name of the set of examples.
        seed: of the bootstrap.
    Returns:
        A verdict on each.
    """
    others = [full] if margin.share is None else [full, base]
    scores, n = meter.scores(margin.metric, [*variants, *others], of), len(variants)
    prompts = [asked(example) for example in meter.examples(of)]
    trios = [[place, *range(n, n + len(others))] for place in range(n)]
    return [
        judge(dataclasses.replace(scores, statistics=scores.statistics[trio]), margin, prompts, seed) for trio in trios
    ]


def check_gains(meter: Meter, margin: Margin | None, sets: Sequence[str]) -> None:
    """Refuse a share of a gain that there is not, before a long search; what is measured for it is needed later anyway.

    Raises:
        MeasureError: the adapter is no better than its base.
    """
    for name in sets:
        if margin is not None and margin.share is not None and meter.examples(name):
            judged(meter, [meter.full], meter.full, meter.base, margin, name, seed=0)


def check_can_decide(margin: Margin | None, held_out: Sequence[Example]) -> None:
    """Refuse a margin that the held-out examples could never show, whatever they say.

    Raises:
        SettingsError: fewer than 2 different prompts; of answers that are right or wrong, too few for the margin: the
            message says how many it takes.
    """
    if margin is None or not held_out:
        return
    n_prompts = len({asked(example) for example in held_out})
    if n_prompts < 2:
        raise SettingsError(f"{n_prompts} prompt to confirm on: no bound can be had. Pass examples with other prompts.")
    if margin.amount is None:
        return
    least = least_margin(margin.metric, n_prompts)
    if least is not None and margin.amount <= least:
        needed = least_examples(margin.amount, largest_difference(margin.metric))
        raise SettingsError(
            f"margin={margin.metric}={margin.amount:g} cannot be shown on {n_prompts} different prompts, even if no "
            f"answer changes: the bound would be {least:.3g}. Pass {needed:,} or more, or a wider margin; losses "
            "(--margin 2%) take fewer."
        )
