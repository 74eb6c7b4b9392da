"""What came of a run, in sentences and a few numbers: for the page and for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lorazor.measure.metrics import metric_named
from lorazor.measure.stats import Interval
from lorazor.report.contents import Run, SmallerAdapter
from lorazor.report.words import bounds, count, most, number, share, short, short_names, signed, worse
from lorazor.select.verdict import Verdict


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


_NOTHING = Headline((), ())


def headline(run: Run) -> Headline:
    """What was dropped, what it cost, the verdict; for other runs, what they found."""
    parts = [_warning(run), _dropped(run), _cost(run), _judged(run), _evaluated(run), _scored(run), _curves(run)]
    parts.append(_trained(run))
    sentences = [sentence for part in parts for sentence in part.sentences]
    numbers = [one for part in parts for one in part.numbers]
    return Headline(tuple(sentences or ["This run has measured nothing that a page could show."]), tuple(numbers))


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


def comparison(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """A row for every run that compares a smaller adapter with the full one, and for every adapter of an evaluation.

    The columns are `COMPARISON`; what is lost is followed by its bounds, and below 0 where nothing is.
    """
    return [row for run in runs for row in _compared(run)]


def _compared(run: Run) -> list[tuple[str, ...]]:
    kept, n_sites, kept_size, size = _sizes(run)
    start = (run.name, run.command, share(kept, n_sites), share(kept_size, size))
    if run.choice is not None:
        return [(*start, *_values(run.choice))]
    full = {one.metric: one.value for one in run.measured if _is_reference(run, one.adapter)}
    names, rows = _names(run), []
    for one in run.measured:
        if not _is_reference(run, one.adapter):
            values = (number(full[one.metric], one.metric), number(one.value, one.metric))
            name = f"{run.name}: {names[one.adapter]}"
            lost = _lost(one.difference, one.metric)
            rows.append((name, *start[1:], one.metric, *values, lost, "–"))
    return rows or [(*start, *["–"] * 5)]


def _values(choice: SmallerAdapter) -> tuple[str, str, str, str, str]:
    """The columns from `metric` on: on the held-out examples where there is a verdict on what stays."""
    metric, chosen, verdict = choice.metric, choice.chosen, choice.verdict
    if chosen == choice.full:
        outcome = "–" if verdict is None else f"{_OUTCOMES[verdict.outcome][0]} (a smaller one)"
        return metric, number(choice.full.value, metric), "–", "–", outcome
    if verdict is not None:
        values = (number(verdict.full_value, metric), number(verdict.value, metric))
        lost = _signed(verdict.lost, verdict.lost_at_least, verdict.lost_at_most, metric)
        return metric, *values, lost, _OUTCOMES[verdict.outcome][0]
    lost = "–"
    if choice.boundary is not None:
        lost = _lost(choice.boundary.chosen.difference, metric)
    elif chosen.lost is not None and chosen.lost_at_most is not None:
        lost = f"{signed(chosen.lost, metric)} (to {signed(chosen.lost_at_most, metric)})"
    outcome = "–" if _is_size(choice) else "not checked"
    return metric, number(choice.full.value, metric), number(chosen.value, metric), lost, outcome


def _warning(run: Run) -> Headline:
    if run.is_finished:
        return _NOTHING
    return Headline(("This run has not finished; what follows is what it had measured.",), ())


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


def _dropped(run: Run) -> Headline:
    kept, n_sites, kept_size, size = _sizes(run)
    if kept is None or n_sites is None:
        return _NOTHING
    sites = f"{count(kept)} of {count(n_sites)} sites stay{_ranks(run)}"
    if kept_size is None or size is None:
        return Headline((), (Fact("of the LoRA sites dropped", share(n_sites - kept, n_sites), (sites,)),))
    details = (sites, f"{count(kept_size)} of {count(size)} parameters")
    fact = Fact("of the LoRA parameters dropped", share(size - kept_size, size), details)
    if kept_size < size or (run.choice is not None and run.choice.boundary is None):  # whose reason says it
        return Headline((), (fact,))
    more = " lorazor shrink looks for what can go inside the layers." if run.choice is not None else ""
    return Headline((f"Nothing is dropped: all sites stay.{more}",), (fact,))


def _ranks(run: Run) -> str:
    """Which ranks stay, where some were lowered."""
    ranks = [site.ranks for site in run.kept if site.ranks is not None]
    if all(kept == rank for kept, rank in ranks):
        return ""
    low, high = min(kept for kept, _ in ranks), max(kept for kept, _ in ranks)
    kept = str(low) if low == high else f"{low} to {high}"
    return f", at rank {kept} of {max(rank for _, rank in ranks)}"


def _cost(run: Run) -> Headline:
    choice = run.choice
    if choice is None:
        if run.command != "shrink" or not run.is_choice:
            return _NOTHING
        sentence = "The weights alone decided, and nothing was measured. With --data it is known what it costs."
        return Headline((sentence,), (Fact("what it costs", "not measured", ("--data measures it",)),))
    metric, chosen = choice.metric, choice.chosen
    details: tuple[str, ...] = ()
    if chosen != choice.full:
        details = (f"full adapter {number(choice.full.value, metric)}",)
        if choice.boundary is not None:
            details += _lines(choice.boundary.chosen.difference, metric)
        elif chosen.lost is not None and chosen.lost_at_most is not None:
            details += (worse(chosen.lost, metric), most(chosen.lost_at_most, metric))
    where = f"{metric} on {count(choice.n_examples)} validation examples"
    return Headline((choice.reason,), (Fact(where, number(chosen.value, metric), details),))


def _judged(run: Run) -> Headline:
    choice = run.choice
    if choice is None:
        return _NOTHING
    verdict, is_full = choice.verdict, choice.chosen == choice.full
    if verdict is None and is_full:
        return _NOTHING
    if verdict is None and _is_size(choice):
        missing = "No verdict: a size was asked for, not a margin. lorazor eval measures it on other examples."
        return Headline((missing,), (Fact("verdict", "none", ("a size has no margin",)),))
    if verdict is None:
        missing = (
            "No verdict: it was chosen on these examples, so what it costs may look smaller than it is. "
            "--confirm judges it on others."
        )
        return Headline((missing,), (Fact("verdict", "not checked", ("--confirm checks it",)),))
    metric, (word, is_good) = verdict.metric, _OUTCOMES[verdict.outcome]
    of = ("of a smaller adapter, which was not kept",) if is_full else ()
    details = (*of, f"full adapter {number(verdict.full_value, metric)}", worse(verdict.lost, metric))
    where = f"{metric} on {count(verdict.n_examples)} held-out examples"
    numbers = (
        Fact(where, number(verdict.value, metric), details),
        Fact(f"worse by less than {number(verdict.margin, metric)}", word, _grounds(verdict), is_good),
    )
    return Headline((verdict.sentence,), numbers)


def _is_size(choice: SmallerAdapter) -> bool:
    """Whether a size was asked for, which no verdict is on."""
    return choice.margin is None and choice.boundary is None


def _grounds(verdict: Verdict) -> tuple[str, ...]:
    """What an outcome rests on."""
    if verdict.outcome == "refuted":
        return (f"at least {number(verdict.lost_at_least, verdict.metric)} worse (95 %)",)
    grounds = (most(verdict.lost_at_most, verdict.metric),)
    return (*grounds, f"about {count(verdict.n_needed)} prompts would decide") if verdict.n_needed else grounds


def _evaluated(run: Run) -> Headline:
    if not run.measured:
        return _NOTHING
    first, called = run.measured[0], _names(run)
    others = [one for one in run.measured if not _is_reference(run, one.adapter)]
    shown = others or list(run.measured)
    numbers = tuple(
        Fact(
            f"{one.metric} of {called[one.adapter]}",
            number(one.value, one.metric),
            _lines(one.difference, one.metric, f"to {called[first.adapter]}") if others else (),
        )
        for one in shown[:4]
    )
    what = f"against {called[first.adapter]}" if others else "alone"
    names = " and ".join(dict.fromkeys(called[one.adapter] for one in shown))
    return Headline((f"{names} measured {what} on {count(first.n_examples)} examples.",), numbers)


def _names(run: Run) -> dict[str, str]:
    """What to call the adapters of an evaluation."""
    adapters = list(dict.fromkeys(one.adapter for one in run.measured))
    return dict(zip(adapters, short_names(adapters), strict=True))


def _is_reference(run: Run, adapter: str) -> bool:
    return adapter == run.measured[0].adapter


def _scored(run: Run) -> Headline:
    scoring = run.scoring
    if scoring is None:
        return _NOTHING
    basis = f" in the {scoring.basis} basis" if scoring.by == "direction" else ""
    n_passes = f"{count(scoring.n_passes)} pass{'es' * (scoring.n_passes > 1)}"
    passes = f", with {n_passes} over each example" if scoring.n_passes else ""
    sentences = [f"By {scoring.by}, ranked by {scoring.score}{basis}{passes}."]
    if scoring.credit_sum is not None and scoring.gain is not None and scoring.error is not None:
        sentences.append(
            f"The credits add up to {short(scoring.credit_sum)}; the adapter gains {short(scoring.gain)} in loss. "
            f"They should be equal; the error is {100 * scoring.error:.1f} %."
        )
    return Headline(tuple(sentences), ())


def _curves(run: Run) -> Headline:
    if run.curves is None:
        return _NOTHING
    boundary = "none" if run.curves.boundary is None else str(run.curves.boundary)
    stack = f"layers of {run.curves.stack}"
    return Headline((run.curves.reason,), (Fact("boundary read off the curves", boundary, (stack,)),))


def _trained(run: Run) -> Headline:
    result = run.document.get("result")
    if not isinstance(result, dict):
        return _NOTHING
    sites, size = result.get("n_sites"), result.get("n_parameters")
    loss, seconds = result.get("loss"), result.get("seconds")
    sentence = f"Trained {count(sites)} sites, {count(size)} parameters, in {count(seconds)} seconds."
    fact = Fact("last training loss", number(loss, "loss"), ("mean of the last logged steps",))
    return Headline((sentence,), (fact,))


def _lost(difference: Interval, metric: str) -> str:
    """A difference as what is lost, with its interval."""
    sign = -1 if metric_named(metric).higher_is_better else 1
    low, high = sorted((sign * difference.low, sign * difference.high))
    return _signed(sign * difference.estimate, low, high, metric)


def _signed(estimate: float, low: float, high: float, metric: str) -> str:
    return f"{signed(estimate, metric)} ({signed(low, metric)} to {signed(high, metric)})"


def _lines(difference: Interval, metric: str, what: str = "difference") -> tuple[str, str]:
    return f"{what} {signed(difference.estimate, metric)}", f"95 %: {bounds(difference, metric)}"
