"""Scores of a trained adapter from start to end: `lorazor score`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lorazor.adapter.fingerprint import base_fingerprint
from lorazor.adapter.folder import AdapterFolder, read_adapter
from lorazor.adapter.load import Loaded, find_adapter, load
from lorazor.adapter.parts import Parts
from lorazor.adapter.sites import Site
from lorazor.data.examples import Example
from lorazor.errors import MeasureError, OutputError, SettingsError
from lorazor.files import sha256_of_file
from lorazor.runs import RunFolder
from lorazor.select.credit import Completeness
from lorazor.select.trained import NEEDS_DATA, PartScores, check_method, score_on_data, score_without_data
from lorazor.settings import DataSettings, ModelSettings, ScoreSettings, Tracker
from lorazor.tracking import check_tracker, track
from lorazor.workflow.losses import encode
from lorazor.workflow.reading import check_fits, read
from lorazor.workflow.starting import start_run

SCORES_FILE = "scores.jsonl"


@dataclass(frozen=True)
class SiteScore:
    """A line of `scores.jsonl`.

    Attributes:
        site: full module name.
        stack: name of its list of layers, None outside every stack.
        layer: zero-based, None outside every stack.
        kind: projection kind.
        n_parameters: numbers in A and B.
        score: higher is more worth keeping.
        standard_error: of `score` over examples, None where no examples were looked at.
        score_per_parameter: `score / n_parameters`.
    """

    site: str
    stack: str | None
    layer: int | None
    kind: str
    n_parameters: int
    score: float
    standard_error: float | None
    score_per_parameter: float


@dataclass(frozen=True)
class ScoreResult:
    """What a scoring came to.

    Attributes:
        out: the run folder.
        method: how sites were scored.
        scores: one for each site, by stack, layer and name.
        n_examples: examples looked at.
        n_passes: forward-backward passes over each example.
        completeness: how well path credits add up, None for other methods.
    """

    out: Path
    method: str
    scores: tuple[SiteScore, ...]
    n_examples: int
    n_passes: int
    completeness: Completeness | None


def score_adapter(
    adapter: str | Path,
    data: str | None,
    out: str | Path,
    scoring: ScoreSettings | None = None,
    model: ModelSettings | None = None,
    reading: DataSettings | None = None,
    say: Callable[[str], None] = lambda message: None,
    tracker: Tracker = "none",
) -> ScoreResult:
    """Score every site of a trained adapter.

    Args:
        adapter: adapter folder or hub id.
        data: validation examples; None for the methods that need none.
        out: the run folder; new. It receives `scores.jsonl` and `score.json`.
        scoring: the method and its settings.
        model: which base model.
        reading: how to read the examples.
        say: receives messages for people.
        tracker: where to log the headline numbers.
    Raises:
        LorazorError: settings, adapter, data or output folder cannot be used; before the model is loaded.
    """
    scoring, model, reading = scoring or ScoreSettings(), model or ModelSettings(), reading or DataSettings()
    out = Path(out)
    check_scoring(scoring, data)
    check_tracker(tracker)
    folder = read_adapter(find_adapter(adapter))
    examples = read(data, reading)[: scoring.score_examples] if data is not None else []
    everything = {"adapter": folder.path, "data": data, "scoring": vars(scoring), "model": vars(model)}
    everything["reading"] = vars(reading)
    inputs = {"adapter": folder.path, "data": Path(data) if data else None}
    run = start_run(out, "score", everything, inputs)
    if scoring.method in NEEDS_DATA:
        loaded = load(folder.path, model)
        check_fits(loaded, examples, reading)
        note_base(run, folder, loaded)
        parts = Parts.sites_of(loaded.sites)
        found = score_examples(loaded, parts, examples, scoring, reading, say)
    else:
        found, examples = score_without_data(scoring.method, folder, seed=scoring.seed), []
    rows = site_scores(folder.sites, found)
    run.write_rows(SCORES_FILE, [dataclasses.asdict(row) for row in rows])
    run.write_json("score.json", score_document(scoring, found, len(examples)))
    track(run, tracker, [(0, {f"score/{row.site}": row.score}) for row in rows])
    run.finish()
    return ScoreResult(out, scoring.method, tuple(rows), len(examples), found.n_passes, found.completeness)


def check_scoring(scoring: ScoreSettings, data: str | None) -> None:
    """Raise SettingsError for a method that is unknown, lacks its data, or settings out of range."""
    check_method(scoring.method)
    if scoring.method in NEEDS_DATA and data is None:
        raise SettingsError(f"method={scoring.method!r} looks at examples. Pass --data, or score by norm.")
    for name in ("points", "score_examples"):
        if getattr(scoring, name) < 1:
            raise SettingsError(f"{name}={getattr(scoring, name)}. Pass 1 or more.")


def score_examples(
    loaded: Loaded,
    parts: Parts,
    examples: Sequence[Example],
    scoring: ScoreSettings,
    reading: DataSettings,
    say: Callable[[str], None],
    is_kept: Any = None,
) -> PartScores:
    """Score parts on examples, as the settings say."""
    return score_on_data(
        scoring.method,
        loaded.model,
        parts,
        encode(loaded, examples, reading, say),
        is_kept=is_kept,
        n_points=scoring.points,
        gradient_checkpointing=scoring.gradient_checkpointing,
        label=f"scoring by {scoring.method}",
        on_message=say,
    )


def note_base(run: RunFolder, folder: AdapterFolder, loaded: Loaded) -> None:
    """Keep in run.json which base model was used."""
    name = loaded.model.config.name_or_path or folder.config.get("base_model_name_or_path")
    run.document["base"] = {"name": name, "fingerprint": base_fingerprint(loaded.model)}


def site_scores(sites: Sequence[Site], found: PartScores) -> list[SiteScore]:
    """The scores of all sites as they are written: of components, their sum."""
    scores, errors = found.of_sites(), found.errors_of_sites()

    def row(site: Site) -> SiteScore:
        score, error = scores[site.name], errors[site.name]
        known = None if error is None or np.isnan(error) else error
        place = (site.name, site.stack, site.layer, site.kind)
        return SiteScore(*place, site.n_parameters, score, known, score / site.n_parameters)

    return [row(site) for site in sites]


def score_document(scoring: ScoreSettings, found: PartScores, n_examples: int) -> dict[str, Any]:
    """What `score.json` says about how scores were found."""
    sums = found.completeness
    return {
        "method": scoring.method,
        "metric": "loss",
        "n_examples": n_examples,
        "n_points": scoring.points if scoring.method == "credit" else None,
        "n_passes": found.n_passes,
        "completeness": sums and {**dataclasses.asdict(sums), "gain": sums.gain, "error": sums.error},
    }


def read_scores(source: str | Path, folder: AdapterFolder) -> tuple[dict[str, float], dict[str, Any]]:
    """The scores of a run folder, for the same adapter.

    Args:
        source: the folder of a `lorazor score` or `lorazor subset` run.
        folder: the adapter that the scores must be of.
    Returns:
        The score of each site of the folder by its name, and the contents of the run's run.json.
    Raises:
        OutputError: not such a run folder, or an unfinished one.
        MeasureError: the scores are of another adapter.
    """
    run = RunFolder.open(Path(source))
    if not run.document.get("finished") or run.document.get("command") not in ("score", "subset"):
        raise OutputError(f"{str(source)!r} is not a finished run of 'lorazor score'. Pass the --out of one.")
    if run.document.get("hashes", {}).get("adapter") != sha256_of_file(folder.weights):
        raise MeasureError(
            f"The scores in {str(source)!r} are of another adapter than {str(folder.path)!r} (its weights have another "
            "hash). Score this adapter: lorazor score."
        )
    try:
        table = {row["site"]: float(row["score"]) for row in run.rows(SCORES_FILE)}
        return {site.name: table[site.name] for site in folder.sites}, run.document
    except (KeyError, TypeError, ValueError, json.JSONDecodeError) as error:
        raise MeasureError(
            f"{str(source)!r} has no score for every site ({error!r}). Score the adapter again: lorazor score."
        ) from error


def check_same_base(document: Mapping[str, Any], loaded: Loaded, source: str | Path) -> None:
    """Raise MeasureError where scores were found with another base model than the one that is loaded now."""
    base = document.get("base")
    if base and base["fingerprint"] != base_fingerprint(loaded.model):
        raise MeasureError(
            f"The scores in {str(source)!r} were found with another base model ({base['name']!r}) than the one loaded "
            "now. Pass that one (--model), or score again."
        )
