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
from lorazor.report.contents import CurvesSummary, GatePaths, Run, ScoringSummary, SiteRow, SmallerAdapter
from lorazor.report.examples import read_answers
from lorazor.report.parsing import T, cleaned, parse_json, parse_rows
from lorazor.report.words import short_names, visible
from lorazor.runs import RunFolder
from lorazor.select.boundary import BoundaryCandidate, BoundaryChoice
from lorazor.select.verdict import Outcome, Verdict
from lorazor.selection import SelectedSite, Selection

_NEEDED = ("command", "finished", "settings", "hashes", "versions")
_OLD_COMMANDS, _OLD_FILES = ("score", "subset"), ("sweep.jsonl", "confirm-sweep.jsonl")
_MOST_GATE_STEPS = 120
"""More points than this on a line cannot be told apart, and make the page large."""


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
    _check_is_new(path, command)
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
        measured=tuple(
            parse_json(path / "metrics.json", lambda rows: [_with_interval(Evaluated, row) for row in rows]) or ()
        ),
        scoring=parse_json(path / "shrink.json", _scoring),
        curves=parse_json(path / "curves.json", _curves),
        gates=_read_gates(path / "gates.jsonl", len(sites), is_finished),
        training=tuple(
            step for step in parse_rows(path / "training.jsonl", _training_step, is_finished) if step is not None
        ),
    )
    variants, examples = read_answers(run)
    return dataclasses.replace(run, variants=variants, examples=examples)


def _check_is_new(path: Path, command: str) -> None:
    """Raise OutputError for a run that holds other files than this version writes."""
    choice = parse_json(path / "choice.json", lambda one: set(one)) or {"verdict"}
    if command in _OLD_COMMANDS or "verdict" not in choice or any((path / name).exists() for name in _OLD_FILES):
        raise OutputError(
            f"{str(path)!r} was made by an earlier lorazor, whose runs this one does not read. Run it again"
            f"{': lorazor shrink does what it did' if command in _OLD_COMMANDS else ''}."
        )


# What the files hold


def _read_sites(path: Path, is_finished: bool) -> tuple[tuple[SiteRow, ...], str | None]:
    """All sites, from scores.jsonl or sites.jsonl in their order, with what selection.json says; and their score."""
    files = [path / "scores.jsonl", path / "sites.jsonl"]
    rows = next((rows for file in files if (rows := parse_rows(file, _site, is_finished))), [])
    if not (path / "selection.json").exists():
        return tuple(rows), None
    selection = Selection.load(path / "selection.json")
    chosen = {visible(site.name): site for site in selection.sites}
    sites = rows or [
        SiteRow(visible(one.name), one.stack and visible(one.stack), one.layer, visible(one.kind))
        for one in selection.sites
    ]
    missing = [site.name for site in sites if site.name not in chosen]
    if missing or len(sites) != len(chosen):
        raise DataError(f"{str(path)!r}: selection.json and the list of sites do not have the same sites.")
    name = selection.settings.get("score")
    return tuple(_with_choice(site, chosen[site.name]) for site in sites), visible(str(name)) if name else None


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


def _with_choice(site: SiteRow, chosen: SelectedSite) -> SiteRow:
    score = site.score if site.score is not None else _optional(chosen.score)
    ranks = (chosen.kept_rank if chosen.keep else 0, chosen.rank)
    return dataclasses.replace(site, keep=chosen.keep, weight=chosen.weight, score=score, ranks=ranks)


def _optional(value: Any) -> float | None:
    return None if value is None else float(value)


def _boundary_choice(document: dict[str, Any], sites: Sequence[SiteRow]) -> SmallerAdapter:
    """choice.json; what a boundary keeps is counted from the sites."""
    if not sites or any(one.n_parameters is None for one in sites):
        raise ValueError("there is no sites.jsonl beside it")
    measured = tuple(_with_interval(BoundaryCandidate, row) for row in document["candidates"])
    boundary = _made(BoundaryChoice, document, candidates=measured)
    sign, stack = -1.0 if boundary.higher_is_better else 1.0, str(document["stack"])

    def candidate(one: BoundaryCandidate) -> Candidate:
        kept = [site for site in sites if site.stack != stack or (site.layer or 0) < one.boundary]
        size = sum(site.n_parameters or 0 for site in kept)
        label = "full" if one.boundary == boundary.full else f"boundary {one.boundary}"
        return Candidate(label, len(kept), size, one.value, sign * one.difference.estimate)

    candidates = {one.boundary: candidate(one) for one in measured}
    return SmallerAdapter(
        metric=boundary.metric,
        higher_is_better=boundary.higher_is_better,
        n_examples=boundary.n_examples,
        reason=boundary.reason,
        candidates=tuple(candidates.values()),
        chosen=candidates[boundary.boundary],
        full=candidates[boundary.full],
        verdict=_verdict(document["verdict"]),
        boundary=boundary,
        stack=stack,
    )


def _shrink_choice(document: dict[str, Any]) -> SmallerAdapter:
    """shrink.json."""
    candidates = tuple(_candidate(row) for row in document["candidates"])
    by_label = {one.label: one for one in candidates}
    return SmallerAdapter(
        metric=str(document["metric"]),
        higher_is_better=bool(document["higher_is_better"]),
        n_examples=int(document["n_examples"]),
        reason=str(document["reason"]),
        candidates=candidates,
        chosen=by_label[document["chosen"]],
        full=by_label["full"],
        margin=_optional(document["margin"]),
        verdict=_verdict(document["verdict"]),
    )


def _candidate(row: dict[str, Any]) -> Candidate:
    """A candidate; the bound of one that was compared is null where nothing can be said."""
    is_boundless = row["lost"] is not None and row["lost_at_most"] is None
    return _made(Candidate, row | ({"lost_at_most": math.inf} if is_boundless else {}))


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
    words = (str(document[key]) for key in ("by", "score", "basis"))
    return ScoringSummary(*words, n_passes=int(scoring["n_passes"]), **sums)


def _made(kind: type[T], row: dict[str, Any], **parsed: Any) -> T:
    """A dataclass whose fields a mapping has, but for those that are parsed already."""
    names = [field.name for field in dataclasses.fields(kind) if field.name not in parsed]  # pyright: ignore[reportArgumentType]
    return kind(**{name: row[name] for name in names}, **parsed)


def _with_interval(kind: type[T], row: dict[str, Any]) -> T:
    """The same of a result with its difference to another, an interval."""
    return _made(kind, row, difference=_made(Interval, row["difference"]))


def _curves(row: dict[str, Any]) -> CurvesSummary:
    points = tuple(_made(CurvePoint, one) for one in row["curves"])
    return CurvesSummary(int(row["n_examples"]), str(row["stack"]), row["boundary"], str(row["reason"]), points)


def _read_gates(path: Path, n_sites: int, is_finished: bool) -> GatePaths | None:
    """The gates, which stand in the order of the sites of scores.jsonl beside them; without it, they are nobody's."""
    if not (path.parent / "scores.jsonl").exists():
        return None

    def step(row: dict[str, Any]) -> tuple[int, tuple[float, ...]]:
        values = tuple(float(value) for value in row["gates"])
        if len(values) != n_sites:
            raise ValueError(f"{len(values)} gates for {n_sites} sites")
        return int(row["step"]), values

    rows = parse_rows(path, step, is_finished)
    every = max(1, -(-len(rows) // _MOST_GATE_STEPS))
    rows = [row for index, row in enumerate(rows) if index % every == 0 or index == len(rows) - 1]
    return GatePaths(tuple(row[0] for row in rows), tuple(row[1] for row in rows)) if rows else None


def _training_step(row: dict[str, Any]) -> tuple[int, float] | None:
    return None if row.get("loss") is None else (int(row["step"]), float(row["loss"]))
