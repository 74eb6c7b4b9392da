"""What the rows of a suite say on the questions that it was made for: every sentence is counted from them."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from lorazor.report.comparisons import BEYOND, VERDICTS, Comparison, by_metric, compared, counted, missing
from lorazor.report.leaderboards import Table, gigabytes, percent, with_error, word
from lorazor.report.suites import FEWEST_SEEDS, Spread, SuiteResults
from lorazor.report.words import count, share

BOUNDARIES = ("boundary", "boundary-best")
SAME_SIZE = ("low-rank", "shrink")
CONTROLS = ("random-sites", "random-sites-rank-1", "low-rank", "last-sites", "last-sites-rank-1")
LEARNERS = (
    "weightlora", "weightlora-credit", "weightlora-every-step", "domlora", "adalora", "directions",
    "directions-from-rank-2", "shrink", "fisher",
)  # fmt: skip
CUTS = (
    "fisher", "shrink", "energy", "energy-healed", "balanced", "balanced-healed", "credit", "credit-healed",
)  # fmt: skip
ALIKE = 0.05
"""How many more parameters, as a share, one of two may have that are of one size."""
MARGIN = 2.0
"""Percent of the gain that a cut may cost."""


@dataclass(frozen=True)
class Finding:
    """A question, and what the rows say on it.

    Attributes:
        key: one word.
        question: as a reader asks it.
        sentences: the answer.
        tables: the numbers behind it.
    """

    key: str
    question: str
    sentences: tuple[str, ...]
    tables: tuple[Table, ...]


def findings(results: SuiteResults) -> list[Finding]:
    """The answers to all questions, also where rows are missing: then they say which.

    Tasks on which LoRA learns nothing are not counted: what methods differ by there is chance.
    """
    idle = [task for task in results.tasks if results.is_idle(task, None, "loss")]
    learned = dataclasses.replace(results, rows=tuple(row for row in results.rows if row["task"] not in idle))
    found = [question(learned) for question in (_boundary, _papers, _choosing, _cutting)]
    if idle:
        note = f"Not counted: {', '.join(idle)}, where lora does not lower the loss of base on every seed."
        found = [dataclasses.replace(one, sentences=(*one.sentences, note)) for one in found]
    return [*found, _costs(results)]


def _finding(
    results: SuiteResults, key: str, question: str, methods: Sequence[str], sentences: list[str], *tables: Table
) -> Finding:
    lacking = missing(results, methods)
    sentences = sentences or ["No rows that answer this, or none of seeds in common."]
    shown = tuple(table for table in tables if table.rows)
    return Finding(key, question, (*sentences, *([lacking] if lacking else [])), shown)


def _versus(
    results: SuiteResults, method: str, against: str, found: Sequence[Comparison] | None = None, about: str = ""
) -> list[str]:
    """A sentence on two methods; none where they have no rows in common."""
    parts = by_metric(results, compared(results, [method], [against]) if found is None else found)
    told = "; ".join(
        f"{name} {counted(part, beyond='' if place else BEYOND)}" for place, (name, part) in enumerate(parts)
    )
    return [f"{method} against {against}{about}: {told}."] if told else []


def _differences(title: str, found: Sequence[Comparison], results: SuiteResults) -> Table:
    rows = []
    for one in found:
        gain = results.gain(one.task, one.budget, one.method, one.metric)
        size, other = (_size(results, one.task, one.budget, method) for method in (one.method, one.against))
        rows.append(
            (one.task, one.budget or "–", one.method, one.metric, size, percent(gain), one.against, other,
             with_error(one.difference, one.metric), word(one.difference))
        )  # fmt: skip
    columns = ("task", "budget", "method", "metric", "parameters", "% of gain", "against", "its parameters")
    return Table(f"{title} (parameters in % of lora's)", (*columns, "difference", "verdict"), tuple(rows))


def _size(results: SuiteResults, task: str, budget: str | None, method: str) -> str:
    kept = results.ratio(task, budget, method, "n_parameters")
    return "–" if kept is None else share(kept.mean, 1)


def _boundary(results: SuiteResults) -> Finding:
    """What a boundary keeps, what it loses, and what other adapters of its size or less do."""
    sentences = []
    for method in BOUNDARIES:
        for task in results.tasks:
            sentences += _kept(results, task, method)
        sentences += _versus(results, method, "lora")
        for other in SAME_SIZE:
            smaller = [one for one in compared(results, [method], [other]) if _size_to(results, one) >= 1]
            where = f" at each budget where {other} has no more parameters"
            sentences += _versus(results, method, other, smaller, where)
    methods = (*BOUNDARIES, *SAME_SIZE)
    against = compared(results, BOUNDARIES, SAME_SIZE)
    table = _differences("Paired differences", [*compared(results, methods, ["lora"]), *against], results)
    return _finding(
        results, "boundary", "Is the boundary real? What does it keep, and what does it lose?",
        ("base", "lora", *methods), sentences, table,
    )  # fmt: skip


def _size_to(results: SuiteResults, one: Comparison) -> float:
    """Parameters of the method in units of the other's, on the seeds that are compared; NaN where that has none."""
    found = results.ratio(one.task, one.budget, one.method, "n_parameters", one.against)
    return math.nan if found is None else found.mean


def _kept(results: SuiteResults, task: str, method: str) -> list[str]:
    """What a method without a budget leaves of the parameters and of the gain; nothing where it has no rows."""
    size = results.ratio(task, None, method, "n_parameters")
    if size is None:
        return []
    own, lora = (results.cells(task, one, None) for one in (method, "lora"))
    common = own.keys() & lora.keys()
    whole = sum(own[seed]["n_parameters"] >= lora[seed]["n_parameters"] for seed in common)
    gain = results.gain(task, None, method, "loss")
    loss = "no share of a gain in loss" if gain is None else f"{percent(gain)} % of its gain in loss"
    kept = f"{share(size.mean, 1)} of lora's parameters and {loss}"
    return [f"{method} on {task} keeps {kept}; it drops nothing in {whole} of {len(common)} trainings."]


def _papers(results: SuiteResults) -> Finding:
    """Whether the last layers matter, and whether gates find sites that are worth more than others."""
    layers = compared(results, ["first-sites"], ["last-sites"])
    sentences = _versus(results, "first-sites", "last-sites", layers)
    sentences += [
        f"{_sided(part, 'the first layers', 'the last layers')} {name}."
        for name, part in by_metric(results, layers)
        if any(one.difference.verdict != "few seeds" for one in part)
    ]
    for against in ("random-sites", "first-sites", "last-sites"):
        sentences += _versus(results, "weightlora", against)
    if sentences:
        sentences.append("Which sites the gates chose is not in the rows, only what training on them ends with.")
    methods = ("first-sites", "last-sites", "random-sites", "weightlora")
    sentences += _filled(results, methods)
    chance = compared(results, ["first-sites", "last-sites", "weightlora"], ["random-sites"])
    gates = compared(results, ["weightlora"], ["first-sites", "last-sites"])
    return _finding(
        results, "papers", "Do the two papers contradict each other: last layers that are not essential, and gates "
        "that choose sites?", methods, sentences,
        _differences("Paired differences", [*layers, *chance, *gates], results),
    )  # fmt: skip


def _sided(found: Sequence[Comparison], first: str, second: str) -> str:
    """Which of two the comparisons favour, as the start of a sentence."""
    better, worse = ([one for one in found if one.difference.verdict == verdict] for verdict in ("better", "worse"))
    if better and worse:
        return f"It depends on where: {first} are worth more on {len(better)}, {second} on {len(worse)},"
    if better or worse:
        side, n = (first, len(better)) if better else (second, len(worse))
        return f"Where anything is shown ({n} of {len(found)}), {side} are worth more"
    return f"It is not shown that {first} or {second} are worth more"


def _choosing(results: SuiteResults) -> Finding:
    """Learning what to keep against not learning it."""
    sentences, rows = [], []
    found = compared(results, LEARNERS, CONTROLS)
    for against in CONTROLS:
        for name, part in by_metric(results, [one for one in found if one.against == against]):
            sentences.append(_grouped(results, part, f"Against {against}, {name}"))
    for method, against in itertools.product(LEARNERS, CONTROLS):
        mine = [one for one in found if (one.method, one.against) == (method, against)]
        for name, part in by_metric(results, mine):
            words = [one.difference.verdict for one in part]
            rows.append((method, against, name, *(str(words.count(verdict)) for verdict in VERDICTS)))
    sentences += _filled(results, (*LEARNERS, *CONTROLS))
    tally = Table("Comparisons over tasks and budgets", ("method", "against", "metric", *VERDICTS), tuple(rows))
    each = _differences("Paired differences within one budget", found, results)
    return _finding(
        results, "choosing", "At equal parameters, does learning which sites or directions to keep beat random sites, "
        "a lower rank and the last layers?", (*LEARNERS, *CONTROLS), sentences, tally, each,
    )  # fmt: skip


_SHOWN = {
    frozenset[str](): "nothing shown",
    frozenset(["better"]): "better somewhere, nowhere shown worse",
    frozenset(["worse"]): "worse somewhere, nowhere shown better",
    frozenset(["better", "worse"]): "better and worse, by place",
}
"""What the verdicts of a method come to."""


def _grouped(results: SuiteResults, found: Sequence[Comparison], start: str) -> str:
    """All comparisons counted, how many are won without more parameters, then the methods by what theirs show."""
    words: dict[str, set[str]] = {}
    for one in found:
        words.setdefault(one.method, set()).add(one.difference.verdict)
    groups: dict[str, list[str]] = {}
    for method, mine in words.items():
        groups.setdefault(_SHOWN[frozenset(mine & {"better", "worse"})], []).append(method)
    told = "; ".join(f"{name}: {', '.join(methods)}" for name, methods in groups.items())
    by_method = "" if set(groups) == {"nothing shown"} else f" By method, {told}."
    better = [one for one in found if one.difference.verdict == "better"]
    fair = sum(_size_to(results, one) <= 1 + ALIKE for one in better)
    more = f"at most {100 * ALIKE:g} % more parameters than what they beat"
    size = f" {fair} of the {len(better)} better ones have {more}." if better else ""
    return f"{start}: {counted(found, with_places=False)}.{size}{by_method}"


def _filled(results: SuiteResults, methods: Sequence[str]) -> list[str]:
    """How much of a budget of parameters the methods use: whole sites and whole ranks do not fill it alike."""
    sentences = []
    for budget in (one for one in results.budgets() if one.startswith("params=")):
        limit, sizes, over = float(budget.removeprefix("params=")), dict[str, float](), []
        for method in methods:
            found = [results.ratio(task, budget, method, "n_parameters") for task in results.tasks]
            if means := [one.mean for one in found if one is not None]:
                sizes[method] = statistics.fmean(means)
                over += [method] if max(means) > 1.001 * limit else []
        named = {method: share(size, 1) for method, size in sizes.items()}
        least, most = (named[pick(sizes, key=sizes.__getitem__)] if sizes else "" for pick in (min, max))
        if least != most:
            lowest, highest = (", ".join(one for one in named if named[one] == end) for end in (least, most))
            sentences.append(
                f"{budget} is a limit, and not all fill it: mean over tasks from {least} of lora's parameters "
                f"({lowest}) to {most} ({highest})."
            )
        if over:
            sentences.append(f"Above {budget} on a task, since they count in sites or ranks: {', '.join(over)}.")
    return sentences


def _cutting(results: SuiteResults) -> Finding:
    """What stays of the gain at each size, method by method."""
    limit, rows, sentences = 100 - MARGIN, [], []
    inside: dict[str, list[str]] = {}
    judged: list[str] = []
    for method, task in itertools.product(CUTS, results.tasks):
        for budget in results.budgets(task, method):
            gain = results.gain(task, budget, method, "loss")
            size = results.ratio(task, budget, method, "n_parameters")
            if gain is None or size is None:
                continue
            verdict = _within(gain, limit)
            rows.append((method, task, budget, share(size.mean, 1), percent(gain), verdict))
            judged += [verdict] if verdict != "few seeds" else []
            places = inside.setdefault(budget, [])
            if gain.mean >= limit:
                places.append(f"{method} on {task} ({percent(gain)} %, {verdict})")
    for budget, places in inside.items():
        n = sum(row[2] == budget for row in rows)
        told = f": {', '.join(places)}" if places else ""
        sentences.append(
            f"At {budget}, the mean gain in loss is at least {limit:g} % of lora's in {len(places)} of {n} cases{told}."
        )
    if rows:
        shown = f"shown in {judged.count('shown')}, below it in {judged.count('below')}, open in {judged.count('open')}"
        told = f"{len(judged)} of {len(rows)} cases have {FEWEST_SEEDS} seeds or more"
        sentences.append(f"{told}: beyond two standard errors at least {limit:g} % is {shown}.")
    columns = ("method", "task", "budget", "parameters of lora", "% of gain in loss", f"at least {limit:g} %")
    return _finding(
        results, "cutting", f"How far can a trained adapter be cut at a margin of {MARGIN:g} % of its gain?",
        ("base", "lora", *CUTS), sentences, Table("Gain that stays", columns, tuple(rows)),
    )  # fmt: skip


def _within(gain: Spread, limit: float) -> str:
    """Where a gain stands to a limit."""
    if gain.error is None or gain.n < FEWEST_SEEDS:
        return "few seeds"
    if abs(gain.mean - limit) <= 2 * gain.error:
        return "open"
    return "shown" if gain.mean > limit else "below"


def _costs(results: SuiteResults) -> Finding:
    """Seconds and peaks of memory, alone and in units of lora's."""
    rows, sentences = [], []
    for task in results.tasks:
        times: dict[str, Spread] = {}
        for method in results.methods(task):
            for budget in results.budgets(task, method) or [None]:
                seconds, memory = (results.ratio(task, budget, method, name) for name in ("seconds", "peak_bytes"))
                if seconds is not None and seconds.n >= FEWEST_SEEDS and method not in ("base", "lora"):
                    times[f"{method} at {budget}" if budget else method] = seconds
                means = (results.mean(task, budget, method, name) for name in ("n_parameters", "seconds", "peak_bytes"))
                size, took, peak = (one and one.mean for one in means)
                assert size is not None and took is not None
                rows.append(
                    (task, method, budget or "–", count(size), f"{took:,.0f}", _times(seconds), gigabytes(peak),
                     _times(memory))
                )  # fmt: skip
        if times:
            sentences.append(
                f"Seconds of choosing and training on {task}, in units of lora's, among methods with {FEWEST_SEEDS} "
                f"seeds or more: {_extremes(times)}."
            )
    devices = list(dict.fromkeys(str(row["device"]) for row in results.rows))
    sentences.append(f"Measured on {', '.join(devices)}; other work on the machine is in these times too.")
    if "cpu" in devices:
        sentences.append(
            "A peak of memory on the CPU is that of the whole process, with what earlier cells left there: methods "
            "are not compared by it."
        )
    columns = ("task", "method", "budget", "parameters", "seconds", "of lora's", "peak GB", "of lora's")
    return _finding(
        results, "costs", "What does each cost in time and memory?", ("lora",), sentences,
        Table("Time and memory", columns, tuple(rows)),
    )  # fmt: skip


def _times(value: Spread | None) -> str:
    if value is None:
        return "–"
    return f"{value.mean:.2f}" if value.error is None else f"{value.mean:.2f} ± {value.error:.2f}"


def _extremes(found: dict[str, Spread]) -> str:
    """The least and the most."""
    told = [f"{method} {_times(found[method])}" for method in sorted(found, key=lambda method: found[method].mean)]
    return ", ".join(told) if len(told) <= 6 else f"least {', '.join(told[:3])}; most {', '.join(told[-3:])}"
