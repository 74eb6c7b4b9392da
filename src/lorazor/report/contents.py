"""What a run folder holds, as plain data. None, or an empty tuple, is what the run does not have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorazor.measure.results import Candidate, CurvePoint, Evaluated
from lorazor.select.boundary import BoundaryChoice
from lorazor.select.verdict import Verdict


@dataclass(frozen=True)
class SiteRow:
    """A LoRA site: where it is, what it scored, whether it stays.

    Attributes:
        name: full module name.
        stack: name of its list of layers; None outside every stack.
        layer: zero-based, in its stack; None outside every stack.
        kind: projection kind, `self_attn.q_proj`.
        n_parameters: numbers in A and B; None where the run does not say.
        score: of the method of the run.
        standard_error: of the score.
        keep: whether it stays; None in runs that choose nothing.
        weight: gate that pruning folds into B.
        ranks: rank that stays, 0 of a dropped site, and rank as trained; None where the run does not say.
    """

    name: str
    stack: str | None
    layer: int | None
    kind: str
    n_parameters: int | None = None
    score: float | None = None
    standard_error: float | None = None
    keep: bool | None = None
    weight: float = 1.0
    ranks: tuple[int, int] | None = None

    @property
    def n_parameters_kept(self) -> int | None:
        """Numbers in A and B that stay: every direction has as many."""
        if self.n_parameters is None or self.ranks is None:
            return None
        kept, rank = self.ranks
        return self.n_parameters * kept // rank

    @property
    def is_lowered(self) -> bool:
        """Whether it stays with a lower rank than it was trained with."""
        return bool(self.keep) and self.ranks is not None and self.ranks[0] < self.ranks[1]


@dataclass(frozen=True)
class SmallerAdapter:
    """A smaller adapter that was chosen, and everything it was chosen from.

    Attributes:
        metric: name of the metric.
        higher_is_better: its direction.
        n_examples: examples that the choice rests on.
        reason: one plain sentence.
        candidates: what was measured, the full adapter among it.
        chosen: what stays.
        full: the full adapter.
        margin: how much worse it may be on these examples, in the metric's unit; None where a size was asked for.
        verdict: None without held-out examples, or where there is nothing to judge.
        boundary: what a boundary was chosen from, with intervals; None for other choices.
        stack: the stack that a boundary cuts.
    """

    metric: str
    higher_is_better: bool
    n_examples: int
    reason: str
    candidates: tuple[Candidate, ...]
    chosen: Candidate
    full: Candidate
    margin: float | None = None
    verdict: Verdict | None = None
    boundary: BoundaryChoice | None = None
    stack: str | None = None


@dataclass(frozen=True)
class ScoringSummary:
    """How the parts of an adapter were ranked.

    Attributes:
        by: what stays or goes together, `direction`.
        score: name of the score.
        basis: of the directions, `balanced`.
        n_passes: forward-backward passes over each example.
        credit_sum: sum of all credits; None where the score does not add up to anything.
        gain: what the adapter gains in loss, measured.
        error: of the sum, relative to the gain.
    """

    by: str
    score: str
    basis: str
    n_passes: int
    credit_sum: float | None = None
    gain: float | None = None
    error: float | None = None


@dataclass(frozen=True)
class CurvesSummary:
    """The curves of a run, with the boundary read off them, if one was."""

    n_examples: int
    stack: str
    boundary: int | None
    reason: str
    points: tuple[CurvePoint, ...]


@dataclass(frozen=True)
class Answer:
    """What one adapter made of one example.

    Attributes:
        loss: nats per answer token; None where it was not measured.
        text: what it wrote; None where it wrote nothing.
        scores: metrics of the text, by name.
        is_right: of a labelled text, whether the label was predicted.
    """

    loss: float | None = None
    text: str | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    is_right: bool | None = None

    @property
    def is_known(self) -> bool:
        """Whether there is anything of it."""
        return self.loss is not None or self.text is not None


@dataclass(frozen=True)
class ComparedExample:
    """One example with the answers of the adapters that the run compares, in the order of `Run.variants`."""

    index: int
    prompt: str
    references: tuple[str, ...]
    label: int | float | str | None
    answers: tuple[Answer, ...]

    @property
    def worsening(self) -> float | None:
        """How much worse the second adapter is than the first: its loss in nats per token, or else its first score.

        With one adapter, how bad that one is.
        """
        first, second = self.answers[0], self.answers[:2][-1]
        if second.loss is not None and first.loss is not None:
            return second.loss - first.loss if len(self.answers) > 1 else second.loss
        metric = next(iter(second.scores), None)
        if metric is None or metric not in first.scores:
            return None
        return first.scores[metric] - second.scores[metric] if len(self.answers) > 1 else -second.scores[metric]


@dataclass(frozen=True)
class Run:
    """Everything a page says about one run.

    Attributes:
        path: its folder.
        name: what the page calls it.
        command: what ran, `boundary`.
        is_finished: False for a run that was interrupted.
        document: all of `run.json`: settings, hashes, versions, notes.
        sites: all sites, in the order of the run's own list.
        score_name: what `SiteRow.score` is.
        gates: of a warm-up: optimizer step, and the gate of every site.
        variants: adapters whose answers are compared, the reference first.
        examples: with an answer of each variant, worst first.
        training: what the trainers logged: step and loss.
    """

    path: Path
    name: str
    command: str
    is_finished: bool
    document: Mapping[str, Any]
    sites: tuple[SiteRow, ...] = ()
    score_name: str | None = None
    choice: SmallerAdapter | None = None
    measured: tuple[Evaluated, ...] = ()
    scoring: ScoringSummary | None = None
    curves: CurvesSummary | None = None
    gates: tuple[tuple[int, tuple[float, ...]], ...] = ()
    variants: tuple[str, ...] = ()
    examples: tuple[ComparedExample, ...] = ()
    training: tuple[tuple[int, float], ...] = ()

    @property
    def kept(self) -> tuple[SiteRow, ...]:
        """The sites that stay."""
        return tuple(site for site in self.sites if site.keep)

    @property
    def is_choice(self) -> bool:
        """Whether the run says of its sites which stay."""
        return any(site.keep is not None for site in self.sites)
