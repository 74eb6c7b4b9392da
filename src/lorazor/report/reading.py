"""From a run folder to plain data. Whatever may be wrong with a folder is found here."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorazor.errors import DataError, OutputError
from lorazor.measure.stats import Interval
from lorazor.report.contents import (
    Choice,
    CurvePoint,
    Curves,
    Gates,
    Measured,
    Point,
    Run,
    Scoring,
    Site,
)
from lorazor.report.examples import read_answers
from lorazor.report.parsing import cleaned, read_json, read_rows
from lorazor.report.words import visible
from lorazor.runs import RunFolder
from lorazor.select.verdict import Confirmation
from lorazor.selection import SelectedSite, Selection

_NEEDED = ("command", "finished", "settings", "hashes", "versions")
_MOST_GATE_STEPS = 120
"""More points than this on a line cannot be told apart, and make the page large."""


def read_runs(paths: Sequence[Path], is_partial_allowed: bool = False) -> list[Run]:
    """Read run folders, each under a name of its own.

    Args:
        paths: the folders.
        is_partial_allowed: also take runs that have not finished.
    Raises:
        OutputError: not a run folder, of a newer version, not finished, or given twice.
        DataError: a file of it is damaged; the message names file and line.
        SelectionError: its selection.json cannot be read.
    """
    resolved = [path.resolve() for path in paths]
    for index, path in enumerate(resolved):
        if path in resolved[:index]:
            raise OutputError(f"{str(paths[index])!r} is given twice. Pass each run once.")
    return [read_run(path, name, is_partial_allowed) for path, name in zip(paths, _names(resolved), strict=True)]


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
        choice=read_json(path / "choice.json", lambda one: _boundary_choice(one, sites))
        or read_json(path / "subset.json", _subset_choice),
        measured=tuple(read_json(path / "metrics.json", lambda rows: [_measured(row) for row in rows]) or ()),
        scoring=read_json(path / "score.json", _scoring),
        curves=read_json(path / "curves.json", _curves),
        gates=_read_gates(path / "gates.jsonl", len(sites), is_finished),
        training=tuple(
            step for step in read_rows(path / "training.jsonl", _training_step, is_finished) if step is not None
        ),
    )
    variants, examples = read_answers(run)
    return dataclasses.replace(run, variants=variants, examples=examples)


def _names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that differ."""
    for n_parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-n_parts:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


# What the files hold


def _read_sites(path: Path, is_finished: bool) -> tuple[tuple[Site, ...], str | None]:
    """All sites, from scores.jsonl or sites.jsonl in their order, with what selection.json says; and their score."""
    files = [path / "scores.jsonl", path / "sites.jsonl"]
    rows = next((rows for file in files if (rows := read_rows(file, _site, is_finished))), [])
    method = read_json(path / "score.json", lambda one: str(one["method"]))
    if not (path / "selection.json").exists():
        return tuple(rows), method
    selection = Selection.load(path / "selection.json")
    chosen = {visible(site.name): site for site in selection.sites}
    sites = rows or [
        Site(visible(one.name), one.stack and visible(one.stack), one.layer, visible(one.kind))
        for one in selection.sites
    ]
    missing = [site.name for site in sites if site.name not in chosen]
    if missing or len(sites) != len(chosen):
        raise DataError(f"{str(path)!r}: selection.json and the list of sites do not have the same sites.")
    name = method or selection.settings.get("score")
    return tuple(_with_choice(site, chosen[site.name]) for site in sites), visible(str(name)) if name else None


def _site(row: dict[str, Any]) -> Site:
    return Site(
        name=str(row["site"]),
        stack=row["stack"],
        layer=row["layer"],
        kind=str(row["kind"]),
        n_parameters=int(row["n_parameters"]),
        score=_optional(row.get("score")),
        standard_error=_optional(row.get("standard_error")),
    )


def _with_choice(site: Site, chosen: SelectedSite) -> Site:
    score = site.score if site.score is not None else _optional(chosen.score)
    ranks = (chosen.kept_rank, chosen.rank)
    return dataclasses.replace(site, keep=chosen.keep, weight=chosen.weight, score=score, ranks=ranks)


def _optional(value: Any) -> float | None:
    return None if value is None else float(value)


def _interval(row: dict[str, Any]) -> Interval:
    return Interval(*(float(row[key]) for key in ("estimate", "low", "high", "standard_error")))


def _boundary_choice(document: dict[str, Any], sites: Sequence[Site]) -> Choice:
    """choice.json; what a boundary keeps is counted from the sites."""

    def point(row: dict[str, Any]) -> Point:
        boundary = int(row["boundary"])
        kept = [one for one in sites if one.stack != document["stack"] or (one.layer or 0) < boundary]
        sizes = [one.n_parameters for one in kept if one.n_parameters is not None]
        return Point(
            label=f"boundary {boundary}",
            value=float(row["value"]),
            difference=_interval(row["difference"]),
            boundary=boundary,
            n_sites=len(kept) if sites else None,
            n_parameters=sum(sizes) if sites and len(sizes) == len(kept) else None,
        )

    points = tuple(point(row) for row in document["candidates"])
    by_boundary = {one.boundary: one for one in points}
    return Choice(
        metric=str(document["metric"]),
        higher_is_better=bool(document["higher_is_better"]),
        n_examples=int(document["n_examples"]),
        reason=str(document["reason"]),
        points=points,
        chosen=by_boundary[document["boundary"]],
        full=by_boundary[document["full"]],
        confirmation=_confirmation(document.get("confirmation")),
        stack=document["stack"],
    )


def _subset_choice(document: dict[str, Any]) -> Choice:
    """subset.json."""

    def point(row: dict[str, Any]) -> Point:
        sizes = {"n_sites": int(row["n_sites"]), "n_parameters": int(row["n_parameters"])}
        return Point(str(row["label"]), float(row["value"]), _interval(row["difference"]), **sizes)

    points = tuple(point(row) for row in document["candidates"])
    return Choice(
        metric=str(document["metric"]),
        higher_is_better=bool(document["higher_is_better"]),
        n_examples=int(document["n_examples"]),
        reason=str(document["reason"]),
        points=points,
        chosen=point(document["chosen"]),
        full=points[0],
        baselines=tuple(point(row) for row in document["baselines"]),
        confirmation=_confirmation(document.get("confirmation")),
    )


def _confirmation(row: dict[str, Any] | None) -> Confirmation | None:
    if row is None:
        return None
    fields = {field.name: row[field.name] for field in dataclasses.fields(Confirmation)}
    return Confirmation(**{**fields, "difference": _interval(row["difference"])})


def _measured(row: dict[str, Any]) -> Measured:
    fields = {field.name: row[field.name] for field in dataclasses.fields(Measured)}
    return Measured(**{**fields, "difference": _interval(row["difference"])})


def _scoring(row: dict[str, Any]) -> Scoring:
    whole = row.get("completeness") or {}
    sums = {key: _optional(whole.get(key)) for key in ("credit_sum", "gain", "error")}
    return Scoring(str(row["method"]), int(row["n_examples"]), row.get("n_passes"), **sums)


def _curves(row: dict[str, Any]) -> Curves:
    keys = [field.name for field in dataclasses.fields(CurvePoint)]
    points = tuple(CurvePoint(**{key: one[key] for key in keys}) for one in row["curves"])
    return Curves(int(row["n_examples"]), str(row["stack"]), row["boundary"], str(row["reason"]), points)


def _read_gates(path: Path, n_sites: int, is_finished: bool) -> Gates | None:
    """The gates, which stand in the order of the sites of scores.jsonl beside them; without it, they are nobody's."""
    if not (path.parent / "scores.jsonl").exists():
        return None

    def step(row: dict[str, Any]) -> tuple[int, tuple[float, ...]]:
        values = tuple(float(value) for value in row["gates"])
        if len(values) != n_sites:
            raise ValueError(f"{len(values)} gates for {n_sites} sites")
        return int(row["step"]), values

    rows = read_rows(path, step, is_finished)
    every = max(1, -(-len(rows) // _MOST_GATE_STEPS))
    rows = [row for index, row in enumerate(rows) if index % every == 0 or index == len(rows) - 1]
    return Gates(tuple(row[0] for row in rows), tuple(row[1] for row in rows)) if rows else None


def _training_step(row: dict[str, Any]) -> tuple[int, float] | None:
    return (int(row["step"]), float(row["loss"])) if "loss" in row else None
