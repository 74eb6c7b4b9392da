"""From a run folder to plain data. Whatever may be wrong with a folder is found here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from lorazor.errors import DataError, OutputError
from lorazor.measure.results import Candidate, CurvePoint, Evaluated
from lorazor.measure.stats import Interval
from lorazor.report.contents import Answer, ComparedExample, CurvesSummary, Run, ScoringSummary, SiteRow, SmallerAdapter
from lorazor.report.parsing import T, cleaned, parse_json, parse_rows
from lorazor.report.words import short_names, visible
from lorazor.runs import RunFolder
from lorazor.select.boundary import BoundaryCandidate, BoundaryChoice
from lorazor.select.verdict import Outcome, Verdict
from lorazor.selection import Selection

_NEEDED = ("command", "finished", "settings", "hashes", "versions")
_MOST_GATE_STEPS = 120
"""More points than this on a line cannot be told apart, and make the page large."""
_NO_METRIC = ("example", "adapter", "key", "text")


def read_runs(paths: Sequence[Path], is_partial_allowed: bool = False) -> list[Run]:
    """Read run folders, each under a name of its own.

    Args:
        paths: the folders.
        is_partial_allowed: also take runs that have not finished.
    Raises:
        OutputError: not a run folder, of another version, not finished, or given twice.
        DataError: a file of it is damaged; the message names file and line.
        SelectionError: its selection.json cannot be read.
    """
    resolved = [path.resolve() for path in paths]
    for index, path in enumerate(resolved):
        if path in resolved[:index]:
            raise OutputError(f"{str(paths[index])!r} is given twice. Pass each run once.")
    names = short_names([str(path) for path in resolved])
    return [read_run(path, name, is_partial_allowed) for path, name in zip(paths, names, strict=True)]


def read_run(path: Path, name: str, is_partial_allowed: bool = False) -> Run:
    """Read one run folder; see `read_runs`."""
    document = cleaned(RunFolder.open(path).document)
    try:
        command, is_finished, *_ = (document[key] for key in _NEEDED)
    except KeyError as error:
        raise DataError(
            f"{str(path / 'run.json')!r} has no {error}. It was changed, or is not from lorazor."
        ) from error
    if not is_finished and not is_partial_allowed:
        raise OutputError(
            f"{str(path)!r} has not finished. The same command with --resume goes on with it; "
            "--partial makes a page of what is there."
        )
    sites, score_name = _read_sites(path, is_finished)
    run = Run(
        path=path,
        name=visible(name),
        command=command,
        is_finished=is_finished,
        document=document,
        sites=sites,
        score_name=score_name,
        choice=parse_json(path / "choice.json", lambda one: _boundary_choice(one, sites))
        or parse_json(path / "shrink.json", _shrink_choice),
        measured=parse_json(path / "metrics.json", lambda rows: tuple(_with_interval(Evaluated, row) for row in rows))
        or (),
        scoring=parse_json(path / "shrink.json", _scoring),
        curves=parse_json(
            path / "curves.json",
            lambda one: _made(CurvesSummary, one, points=tuple(_made(CurvePoint, point) for point in one["curves"])),
        ),
        gates=_read_gates(path, len(sites), is_finished),
        training=tuple(step for step in parse_rows(path / "training.jsonl", _training, is_finished) if step),
    )
    variants, examples = _read_answers(run)
    return dataclasses.replace(run, variants=variants, examples=examples)


# What the files hold


def _read_sites(path: Path, is_finished: bool) -> tuple[tuple[SiteRow, ...], str | None]:
    """All sites, from scores.jsonl or sites.jsonl in their order, with what selection.json says; and their score."""
    files = [path / "scores.jsonl", path / "sites.jsonl"]
    sites = next((rows for file in files if (rows := parse_rows(file, _site, is_finished))), [])
    if not (path / "selection.json").exists():
        return tuple(sites), None
    selection = Selection.load(path / "selection.json")
    chosen = {visible(site.name): site for site in selection.sites}
    if not sites:
        sites = [
            SiteRow(name, one.stack and visible(one.stack), one.layer, visible(one.kind))
            for name, one in chosen.items()
        ]
    if sorted(site.name for site in sites) != sorted(chosen):
        raise DataError(f"{str(path)!r}: selection.json and the list of sites do not have the same sites.")
    with_choice = []
    for site in sites:
        one = chosen[site.name]
        ranks = (one.kept_rank if one.keep else 0, one.rank)
        score = one.score if site.score is None else site.score
        with_choice.append(dataclasses.replace(site, keep=one.keep, weight=one.weight, score=score, ranks=ranks))
    score_name = selection.settings.get("score")
    return tuple(with_choice), visible(str(score_name)) if score_name else None


def _site(row: dict[str, Any]) -> SiteRow:
    return SiteRow(
        name=str(row["site"]),
        stack=row["stack"],
        layer=row["layer"],
        kind=str(row["kind"]),
        n_parameters=int(row["n_parameters"]),
        score=_optional(row.get("score")),
        standard_error=_optional(row.get("standard_error")),
    )


def _optional(value: Any) -> float | None:
    return None if value is None else float(value)


def _boundary_choice(document: dict[str, Any], sites: Sequence[SiteRow]) -> SmallerAdapter:
    """choice.json; what a boundary keeps is counted from the sites."""
    if not sites or any(one.n_parameters is None for one in sites):
        raise ValueError("there is no sites.jsonl beside it")
    measured = tuple(_with_interval(BoundaryCandidate, row) for row in document["candidates"])
    boundary = _made(BoundaryChoice, document, candidates=measured)
    candidates = {}
    for one in measured:
        kept = [site for site in sites if site.stack != document["stack"] or (site.layer or 0) < one.boundary]
        size = sum(site.n_parameters or 0 for site in kept)
        label = "full" if one.boundary == boundary.full else f"boundary {one.boundary}"
        lost = one.difference.estimate * (-1 if boundary.higher_is_better else 1)
        candidates[one.boundary] = Candidate(label, len(kept), size, one.value, lost)
    return _made(
        SmallerAdapter,
        document,
        candidates=tuple(candidates.values()),
        chosen=candidates[boundary.boundary],
        full=candidates[boundary.full],
        margin=None,
        verdict=_verdict(document["verdict"]),
        boundary=boundary,
    )


def _shrink_choice(document: dict[str, Any]) -> SmallerAdapter:
    """shrink.json; the bound of a candidate that was compared is null where nothing can be said."""
    candidates = []
    for row in document["candidates"]:
        is_boundless = row["lost"] is not None and row["lost_at_most"] is None
        candidates.append(_made(Candidate, row | ({"lost_at_most": math.inf} if is_boundless else {})))
    by_label = {one.label: one for one in candidates}
    return _made(
        SmallerAdapter,
        document,
        candidates=tuple(candidates),
        chosen=by_label[document["chosen"]],
        full=by_label["full"],
        verdict=_verdict(document["verdict"]),
        boundary=None,
        stack=None,
    )


def _verdict(row: dict[str, Any] | None) -> Verdict | None:
    if row is None:
        return None
    if row["outcome"] not in get_args(Outcome):
        raise ValueError(f"a verdict is not {row['outcome']!r}")
    bounds = {"lost_at_least": -math.inf, "lost_at_most": math.inf}  # null where nothing can be said
    return _made(Verdict, row | {name: none for name, none in bounds.items() if row[name] is None})


def _scoring(document: dict[str, Any]) -> ScoringSummary:
    scoring = document["scoring"]
    whole = scoring["completeness"] or {}
    sums = {key: _optional(whole.get(key)) for key in ("credit_sum", "gain", "error")}
    return _made(ScoringSummary, document, n_passes=int(scoring["n_passes"]), **sums)


def _made(kind: type[T], row: dict[str, Any], **parsed: Any) -> T:
    """A dataclass whose fields a mapping has, but for those that are parsed already."""
    names = [field.name for field in dataclasses.fields(kind) if field.name not in parsed]  # pyright: ignore[reportArgumentType]
    return kind(**{name: row[name] for name in names}, **parsed)


def _with_interval(kind: type[T], row: dict[str, Any]) -> T:
    """The same of a result with its difference to another, an interval."""
    return _made(kind, row, difference=_made(Interval, row["difference"]))


def _read_gates(path: Path, n_sites: int, is_finished: bool) -> tuple[tuple[int, tuple[float, ...]], ...]:
    """The gates, which stand in the order of the sites of scores.jsonl beside them; without it, they are nobody's."""
    if not (path / "scores.jsonl").exists():
        return ()

    def step(row: dict[str, Any]) -> tuple[int, tuple[float, ...]]:
        values = tuple(float(value) for value in row["gates"])
        if len(values) != n_sites:
            raise ValueError(f"{len(values)} gates for {n_sites} sites")
        return int(row["step"]), values

    rows = parse_rows(path / "gates.jsonl", step, is_finished)
    every = max(1, -(-len(rows) // _MOST_GATE_STEPS))
    return tuple(row for index, row in enumerate(rows) if index % every == 0 or index == len(rows) - 1)


def _training(row: dict[str, Any]) -> tuple[int, float] | None:
    return None if row.get("loss") is None else (int(row["step"]), float(row["loss"]))


# Examples, with what each adapter made of them


def _read_answers(run: Run) -> tuple[tuple[str, ...], tuple[ComparedExample, ...]]:
    """The adapters that a run compares, and their answers to each example.

    Returns:
        Names of the adapters, the one that the others are compared with first; and the examples that have a loss or a
        text of each, those first that are worst with the second adapter against the first. Nothing of either where
        the run has no examples.jsonl.
    """
    given = run.document["settings"].get("adapters") or []
    names = dict(zip(given, short_names(given), strict=True))  # to show, by what the files call them
    if run.choice is not None:
        full, chosen = run.choice.full, run.choice.chosen
        names = {full.label: "full adapter"} | ({} if chosen == full else {chosen.label: chosen.label})
    answers = _answers_by_adapter(run)
    variants = {key: name for key, name in names.items() if key in answers}

    def example(row: dict[str, Any]) -> ComparedExample:
        index, label = int(row["example"]), row["label"]
        found = [answers[key].get(index, Answer()) for key in variants]
        if label is None or isinstance(label, float):
            found = [dataclasses.replace(answer, is_right=None) for answer in found]
        references = tuple(str(one) for one in row["references"])
        return ComparedExample(index, str(row["prompt"]), references, label, tuple(found))

    examples = parse_rows(run.path / "examples.jsonl", example, run.is_finished)
    if variants:
        examples = [one for one in examples if all(answer.is_known for answer in one.answers)]
        examples.sort(key=lambda one: (math.inf if one.worsening is None else -one.worsening, one.index))
    return (tuple(variants.values()), tuple(examples)) if variants and examples else ((), ())


def _answers_by_adapter(run: Run) -> dict[str, dict[int, Answer]]:
    """Losses and texts of every adapter and example, of the held-out ones if there are any."""
    prefix = "" if run.document["settings"].get("confirm") is None else "confirm-"
    answers: dict[str, dict[int, Answer]] = {}

    def add(row: dict[str, Any], **found: Any) -> None:
        of_adapter, index = answers.setdefault(str(row["adapter"]), {}), int(row["example"])
        of_adapter[index] = dataclasses.replace(of_adapter.get(index, Answer()), **found)

    def add_loss(row: dict[str, Any]) -> None:
        n_tokens = int(row["n_tokens"])
        add(row, loss=float(row["nll_nats"]) / n_tokens, is_right=int(row["n_correct"]) == n_tokens)

    def add_text(row: dict[str, Any]) -> None:
        scores = {name: float(value) for name, value in row.items() if name not in _NO_METRIC}
        add(row, text=str(row["text"]), scores=scores)

    parse_rows(run.path / f"{prefix}losses.jsonl", add_loss, run.is_finished)
    parse_rows(run.path / f"{prefix}predictions.jsonl", add_text, run.is_finished)
    return answers
