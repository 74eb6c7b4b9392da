"""What came of a run, in sentences and a few numbers: for the page and for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lorazor.measure.metrics import metric_named
from lorazor.measure.results import Evaluated
from lorazor.measure.stats import Interval
from lorazor.report.contents import Run, SmallerAdapter
from lorazor.report.words import bounds, count, most, number, share, short, short_names, signed, worse


@dataclass(frozen=True)
class Fact:
    """A number that stands out.

    Attributes:
        label: what it is.
        value: the number.
        details: what it is compared with, and how sure it is, line by line.
        is_good: for a verdict, which it is; None for a number.
    """

    label: str
    value: str
    details: tuple[str, ...] = ()
    is_good: bool | None = None


@dataclass(frozen=True)
class Headline:
    """What came of a run: sentences, and the numbers in them."""

    sentences: tuple[str, ...]
    numbers: tuple[Fact, ...]


COMPARISON = (
    "run",
    "command",
    "sites kept",
    "parameters kept",
    "metric",
    "full adapter",
    "this adapter",
    "worse by (95 % bounds)",
    "verdict",
)

_OUTCOMES = {"shown": ("✓ shown", True), "refuted": ("✗ refuted", False), "undecided": ("undecided", None)}


def headline(run: Run) -> Headline:
    """What was dropped, what it cost, the verdict; for other runs, what they found."""
    parts = [_dropped(run), _cost(run), _judged(run), _evaluated(run), _found_otherwise(run)]
    found = [one for part in parts for one in part]
    sentences = [one for one in found if isinstance(one, str)]
    if not run.is_finished:
        sentences.insert(0, "This run has not finished; what follows is what it had measured.")
    numbers = tuple(one for one in found if isinstance(one, Fact))
    return Headline(tuple(sentences or ["This run has measured nothing that a page could show."]), numbers)


def comparison(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """A row for every run that compares a smaller adapter with the full one, and for every adapter of an evaluation.

    The columns are `COMPARISON`; what is lost is followed by its bounds, and below 0 where nothing is.
    """
    rows: list[tuple[str, ...]] = []
    for run in runs:
        kept, n_sites, kept_size, size = _sizes(run)
        start = (run.command, share(kept, n_sites), share(kept_size, size))
        names, others = _evaluated_adapters(run)
        full = {one.metric: number(one.value, one.metric) for one in run.measured if one not in others}
        if run.choice is not None:
            rows.append((run.name, *start, *_values(run.choice)))
        elif not others:
            rows.append((run.name, *start, *["–"] * 5))
        else:
            rows += [
                (
                    f"{run.name}: {names[one.adapter]}",
                    *start,
                    one.metric,
                    full[one.metric],
                    number(one.value, one.metric),
                    _lost(one.difference, one.metric),
                    "–",
                )
                for one in others
            ]
    return rows


def _values(choice: SmallerAdapter) -> tuple[str, str, str, str, str]:
    """The columns from `metric` on: on the held-out examples where there is a verdict on what stays."""
    metric, chosen, verdict = choice.metric, choice.chosen, choice.verdict
    full, value, lost = number(choice.full.value, metric), number(chosen.value, metric), "–"
    if chosen == choice.full:
        return metric, full, "–", "–", "–" if verdict is None else f"{_OUTCOMES[verdict.outcome][0]} (a smaller one)"
    if verdict is not None:
        lost = _signed(verdict.lost, verdict.lost_at_least, verdict.lost_at_most, metric)
        full, value = number(verdict.full_value, metric), number(verdict.value, metric)
        return metric, full, value, lost, _OUTCOMES[verdict.outcome][0]
    if choice.boundary is not None:
        lost = _lost(choice.boundary.chosen.difference, metric)
    elif chosen.lost is not None and chosen.lost_at_most is not None:
        lost = f"{signed(chosen.lost, metric)} (to {signed(chosen.lost_at_most, metric)})"
    return metric, full, value, lost, "–" if _is_size(choice) else "not checked"


def _sizes(run: Run) -> tuple[int | None, int | None, int | None, int | None]:
    """Sites kept, sites, parameters kept, parameters; None for what the run does not say."""
    choice = run.choice
    if choice is not None:
        return choice.chosen.n_sites, choice.full.n_sites, choice.chosen.n_parameters, choice.full.n_parameters
    if not run.is_choice:
        return None, None, None, None
    kept = [site.n_parameters_kept for site in run.sites]
    sizes = [site.n_parameters for site in run.sites]
    if None in kept or None in sizes:
        return len(run.kept), len(run.sites), None, None
    return len(run.kept), len(run.sites), sum(size or 0 for size in kept), sum(size or 0 for size in sizes)


# The parts of a headline: sentences and numbers, in their order


def _dropped(run: Run) -> Iterator[str | Fact]:
    kept, n_sites, kept_size, size = _sizes(run)
    if kept is None or n_sites is None:
        return
    sites = f"{count(kept)} of {count(n_sites)} sites stay"
    if any(site.is_lowered for site in run.kept):
        ranks = [site.ranks for site in run.kept if site.ranks is not None]
        low, high = min(left for left, _ in ranks), max(left for left, _ in ranks)
        sites += f", at rank {low if low == high else f'{low} to {high}'} of {max(rank for _, rank in ranks)}"
    if kept_size is None or size is None:
        yield Fact("of the LoRA sites dropped", share(n_sites - kept, n_sites), (sites,))
        return
    details = (sites, f"{count(kept_size)} of {count(size)} parameters")
    yield Fact("of the LoRA parameters dropped", share(size - kept_size, size), details)
    if kept_size == size and (run.choice is None or run.choice.boundary is not None):  # else the reason says it
        more = " lorazor shrink looks for what can go inside the layers." if run.choice is not None else ""
        yield f"Nothing is dropped: all sites stay.{more}"


def _cost(run: Run) -> Iterator[str | Fact]:
    choice = run.choice
    if choice is None:
        if run.command == "shrink" and run.is_choice:
            yield "The weights alone decided, and nothing was measured. With --data it is known what it costs."
            yield Fact("what it costs", "not measured", ("--data measures it",))
        return
    metric, chosen = choice.metric, choice.chosen
    details: tuple[str, ...] = ()
    if chosen != choice.full:
        details = (f"full adapter {number(choice.full.value, metric)}",)
        if choice.boundary is not None:
            details += _lines(choice.boundary.chosen.difference, metric)
        elif chosen.lost is not None and chosen.lost_at_most is not None:
            details += (worse(chosen.lost, metric), most(chosen.lost_at_most, metric))
    yield choice.reason
    yield Fact(f"{metric} on {count(choice.n_examples)} validation examples", number(chosen.value, metric), details)


def _judged(run: Run) -> Iterator[str | Fact]:
    choice = run.choice
    if choice is None:
        return
    verdict, is_full = choice.verdict, choice.chosen == choice.full
    if verdict is None and is_full:
        return
    if verdict is None and _is_size(choice):
        yield "No verdict: a size was asked for, not a margin. lorazor eval measures it on other examples."
        yield Fact("verdict", "none", ("a size has no margin",))
        return
    if verdict is None:
        yield (
            "No verdict: it was chosen on these examples, so what it costs may look smaller than it is. "
            "--confirm judges it on others."
        )
        yield Fact("verdict", "not checked", ("--confirm checks it",))
        return
    metric, (word, is_good) = verdict.metric, _OUTCOMES[verdict.outcome]
    of = ("of a smaller adapter, which was not kept",) if is_full else ()
    details = (*of, f"full adapter {number(verdict.full_value, metric)}", worse(verdict.lost, metric))
    grounds = (most(verdict.lost_at_most, metric),)
    if verdict.outcome == "refuted":
        grounds = (f"at least {number(verdict.lost_at_least, metric)} worse (95 %)",)
    elif verdict.n_needed:
        grounds += (f"about {count(verdict.n_needed)} prompts would decide",)
    yield verdict.sentence
    yield Fact(f"{metric} on {count(verdict.n_examples)} held-out examples", number(verdict.value, metric), details)
    yield Fact(f"worse by less than {number(verdict.margin, metric)}", word, grounds, is_good)


def _is_size(choice: SmallerAdapter) -> bool:
    """Whether a size was asked for, which no verdict is on."""
    return choice.margin is None and choice.boundary is None


def _evaluated(run: Run) -> Iterator[str | Fact]:
    if not run.measured:
        return
    names, others = _evaluated_adapters(run)
    first, shown = names[run.measured[0].adapter], others or run.measured
    what = f"against {first}" if others else "alone"
    who = " and ".join(dict.fromkeys(names[one.adapter] for one in shown))
    yield f"{who} measured {what} on {count(run.measured[0].n_examples)} examples."
    for one in shown[:4]:
        lines = _lines(one.difference, one.metric, f"to {first}") if others else ()
        yield Fact(f"{one.metric} of {names[one.adapter]}", number(one.value, one.metric), lines)


def _evaluated_adapters(run: Run) -> tuple[dict[str, str], list[Evaluated]]:
    """What to call the adapters of an evaluation, and what was measured of all but the first."""
    adapters = list(dict.fromkeys(one.adapter for one in run.measured))
    others = [one for one in run.measured if one.adapter != adapters[0]]
    return dict(zip(adapters, short_names(adapters), strict=True)), others


def _found_otherwise(run: Run) -> Iterator[str | Fact]:
    """What the scores add up to, the boundary read off the curves, what was trained."""
    if (scoring := run.scoring) is not None:
        basis = f" in the {scoring.basis} basis" if scoring.by == "direction" else ""
        n_passes = f"{count(scoring.n_passes)} pass{'es' * (scoring.n_passes > 1)}"
        passes = f", with {n_passes} over each example" if scoring.n_passes else ""
        yield f"By {scoring.by}, ranked by {scoring.score}{basis}{passes}."
        if scoring.credit_sum is not None and scoring.gain is not None and scoring.error is not None:
            yield (
                f"The credits add up to {short(scoring.credit_sum)}; the adapter gains {short(scoring.gain)} in loss. "
                f"They should be equal; the error is {100 * scoring.error:.1f} %."
            )
    if run.curves is not None:
        boundary = "none" if run.curves.boundary is None else str(run.curves.boundary)
        yield run.curves.reason
        yield Fact("boundary read off the curves", boundary, (f"layers of {run.curves.stack}",))
    if run.command == "train" and isinstance(result := run.document.get("result"), dict):
        sites, size, seconds = (count(result.get(name)) for name in ("n_sites", "n_parameters", "seconds"))
        yield f"Trained {sites} sites, {size} parameters, in {seconds} seconds."
        yield Fact("last training loss", number(result.get("loss"), "loss"), ("mean of the last logged steps",))


# Differences in words


def _lost(difference: Interval, metric: str) -> str:
    """A difference as what is lost, with its interval."""
    sign = -1 if metric_named(metric).higher_is_better else 1
    low, high = sorted((sign * difference.low, sign * difference.high))
    return _signed(sign * difference.estimate, low, high, metric)


def _signed(estimate: float, low: float, high: float, metric: str) -> str:
    return f"{signed(estimate, metric)} ({signed(low, metric)} to {signed(high, metric)})"


def _lines(difference: Interval, metric: str, what: str = "difference") -> tuple[str, str]:
    return f"{what} {signed(difference.estimate, metric)}", f"95 %: {bounds(difference, metric)}"
