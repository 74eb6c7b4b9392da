"""What came of a run, in sentences and a few numbers: for the page and for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lorazor.measure.stats import Interval
from lorazor.report.contents import Choice, Run
from lorazor.report.words import bounds, count, number, share, short, signed
from lorazor.select.verdict import NOTHING_TO_CONFIRM, counted


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
    """What was dropped, what it cost, whether it held; for other runs, what they found."""
    parts = [_warning(run), _dropped(run), _cost(run), _held(run), _evaluated(run), _scored(run), _curves(run)]
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
    "part kept",
    "difference (95 % interval)",
    "on held-out data",
)


def comparison(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """A row for every run that compares a part with the full adapter, and for every adapter of an evaluation.

    The columns are `COMPARISON`; a difference is followed by its 95 % interval.
    """
    return [row for run in runs for row in _compared(run)]


def _compared(run: Run) -> list[tuple[str, ...]]:
    kept, n_sites, kept_size, size = _sizes(run)
    start = (run.name, run.command, share(kept, n_sites), share(kept_size, size))
    if run.choice is not None:
        return [(*start, *_values(run.choice), _verdict(run.choice))]
    full = {one.metric: one.value for one in run.measured if _is_reference(run, one.adapter)}
    rows = []
    for one in run.measured:
        if not _is_reference(run, one.adapter):
            values = (number(full[one.metric], one.metric), number(one.value, one.metric))
            name = f"{run.name}: {Path(one.adapter).name}"
            rows.append((name, *start[1:], one.metric, *values, _difference(one.difference, one.metric), "–"))
    return rows or [(*start, *["–"] * 5)]


def _warning(run: Run) -> Headline:
    if run.is_finished:
        return _NOTHING
    return Headline(("This run has not finished; what follows is what it had measured.",), ())


def _sizes(run: Run) -> tuple[int | None, int | None, int | None, int | None]:
    """Sites kept, sites, parameters kept, parameters; None for what the run does not say."""
    choice = run.choice
    if choice is not None and choice.full.n_sites:
        return choice.chosen.n_sites, choice.full.n_sites, choice.chosen.n_parameters, choice.full.n_parameters
    if not run.is_choice:
        return None, None, None, None
    sizes = [site.n_parameters for site in run.sites]
    if any(size is None for size in sizes):
        return len(run.kept), len(run.sites), None, None
    return (
        len(run.kept),
        len(run.sites),
        sum(site.n_parameters or 0 for site in run.kept),
        sum(map(int, filter(None, sizes))),
    )


def _dropped(run: Run) -> Headline:
    kept, n_sites, kept_size, size = _sizes(run)
    if kept is None or n_sites is None:
        return _NOTHING
    sites = f"{count(kept)} of {count(n_sites)} sites stay"
    if kept_size is None or size is None:
        return Headline((), (Fact("of the LoRA sites dropped", share(n_sites - kept, n_sites), (sites,)),))
    details = (sites, f"{count(kept_size)} of {count(size)} parameters")
    fact = Fact("of the LoRA parameters dropped", share(size - kept_size, size), details)
    return Headline(("Nothing was dropped: all sites stay.",) if kept == n_sites else (), (fact,))


def _cost(run: Run) -> Headline:
    choice = run.choice
    if choice is None:
        return _NOTHING
    metric, chosen = choice.metric, choice.chosen
    details = (f"full adapter {number(choice.full.value, metric)}", *_lines(chosen.difference, metric))
    where = f"{metric} on {count(choice.n_examples)} validation examples"
    return Headline((choice.reason,), (Fact(where, number(chosen.value, metric), details),))


def _held(run: Run) -> Headline:
    if run.choice is None:
        return _NOTHING
    confirmation = run.choice.confirmation
    if confirmation is None and run.choice.is_everything:
        return Headline((NOTHING_TO_CONFIRM,), ())
    if confirmation is None:
        missing = "It was not confirmed on held-out examples, so its cost may look smaller than it is."
        return Headline((missing,), (Fact("on held-out data", "not checked", ("--confirm checks it",)),))
    metric = confirmation.metric
    details = (f"full adapter {number(confirmation.full_value, metric)}", *_lines(confirmation.difference, metric))
    where = f"{metric} on {count(confirmation.n_examples)} held-out examples"
    verdict = "✓ held" if confirmation.held else "✗ did not hold"
    differing = f"the two differ on {counted(confirmation.n_differing, 'example')}"
    numbers = (
        Fact(where, number(confirmation.value, metric), details),
        Fact("on held-out data", verdict, (differing,), confirmation.held),
    )
    return Headline((confirmation.sentence,), numbers)


def _evaluated(run: Run) -> Headline:
    if not run.measured:
        return _NOTHING
    first = run.measured[0]
    others = [one for one in run.measured if not _is_reference(run, one.adapter)]
    shown = others or list(run.measured)
    numbers = tuple(
        Fact(
            f"{one.metric} of {Path(one.adapter).name}",
            number(one.value, one.metric),
            _lines(one.difference, one.metric, f"to {Path(first.adapter).name}") if others else (),
        )
        for one in shown[:4]
    )
    what = f"against {Path(first.adapter).name}" if others else "alone"
    names = " and ".join(dict.fromkeys(Path(one.adapter).name for one in shown))
    return Headline((f"{names} measured {what} on {count(first.n_examples)} examples.",), numbers)


def _is_reference(run: Run, adapter: str) -> bool:
    return adapter == run.measured[0].adapter


def _scored(run: Run) -> Headline:
    scoring = run.scoring
    if scoring is None:
        return _NOTHING
    on = f" on {count(scoring.n_examples)} examples" if scoring.n_examples else ", from the weights alone"
    passes = f", {count(scoring.n_passes)} forward-backward passes over each" if scoring.n_passes else ""
    sentences = [f"{len(run.sites)} sites scored by {scoring.method}{on}{passes}."]
    numbers = [Fact("sites scored", count(len(run.sites)), (scoring.method,))]
    if scoring.credit_sum is not None and scoring.gain is not None and scoring.error is not None:
        sentences.append(
            f"The credits add up to {short(scoring.credit_sum)}; the adapter gains {short(scoring.gain)} in loss. "
            f"They should be equal; the error is {100 * scoring.error:.1f} %."
        )
        numbers.append(
            Fact("error of the sum of credits", f"{100 * scoring.error:.1f} %", ("relative to the measured gain",))
        )
    return Headline(tuple(sentences), tuple(numbers))


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


def _values(choice: Choice) -> tuple[str, str, str, str]:
    metric = choice.metric
    value, full, difference = choice.chosen.value, choice.full.value, choice.chosen.difference
    if choice.confirmation is not None:
        one = choice.confirmation
        value, full, difference = one.value, one.full_value, one.difference
    return metric, number(full, metric), number(value, metric), _difference(difference, metric)


def _verdict(choice: Choice) -> str:
    if choice.confirmation is None:
        return "nothing dropped" if choice.is_everything else "not checked"
    return "✓ held" if choice.confirmation.held else "✗ did not hold"


def _difference(difference: Interval, metric: str) -> str:
    return f"{signed(difference.estimate, metric)} ({bounds(difference, metric)})"


def _lines(difference: Interval, metric: str, what: str = "difference") -> tuple[str, str]:
    return f"{what} {signed(difference.estimate, metric)}", f"95 %: {bounds(difference, metric)}"
