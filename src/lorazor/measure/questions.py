"""Metrics of questions, as the official scripts of SQuAD 1.1 and 2.0 count. This module never imports torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lorazor.errors import SettingsError
from lorazor.measure.metrics import exact_match, metric_named, normalise_answer, token_f1
from lorazor.measure.stats import Scores, ratio

QUESTION_METRICS = (
    "loss",
    "exact-match",
    "token-f1",
    "hasans-exact-match",
    "hasans-token-f1",
    "noans-exact-match",
    "noans-token-f1",
)
"""What can be asked of questions."""


def question_scores(
    metric: str, texts: Sequence[Sequence[str]], answers: Sequence[Sequence[str]], is_squad_2: bool
) -> Scores:
    """A metric of answers to questions.

    The scripts differ where words vanish, those of "The". 2.0 drops such answers, and asks for none where none is left;
    in 1.1 they are compared, and have no F1.

    Args:
        metric: of text, see `QUESTION_METRICS`.
        texts: (n_variants, n_questions), "" for none.
        answers: of each question, none where it has none.
        is_squad_2: whether to count as SQuAD 2.0, as where any question of the data has no answer.
    Raises:
        SettingsError: the metric is unknown, or is of questions with or without an answer, of which there are none.
    Source: `evaluate-v1.1.py` and `evaluate-v2.0.py` of SQuAD's web site; of the latter `exact`, `f1`, `HasAns_exact`,
        `HasAns_f1`, `NoAns_exact`, `NoAns_f1`, all at a threshold that answers are held to already.
    """
    check_questions(metric, answers)
    part, _, name = metric.rpartition("ans-")
    score = exact_match if name == "exact-match" else token_f1
    statistics = np.zeros((len(texts), len(answers), 2))
    for place, own in enumerate(answers):
        if part and bool(own) != (part == "has"):
            continue
        with_words = [answer for answer in own if normalise_answer(answer)]
        right = (with_words or [""]) if is_squad_2 else with_words if name == "token-f1" else own
        statistics[:, place, 0] = [score(row[place], right) if right else 0.0 for row in texts]
        statistics[:, place, 1] = 1.0
    return Scores(metric, True, statistics, ratio)


def check_questions(metric: str, answers: Sequence[Sequence[str]] | None = None) -> None:
    """Refuse a metric that questions do not have, or not these.

    Args:
        metric: its name.
        answers: of each question; None if they are not read yet.
    Raises:
        SettingsError: it is not one of questions, or of some of which there are none.
    """
    if metric_named(metric).name not in QUESTION_METRICS:
        raise SettingsError(f"metric={metric!r} is not one of questions. Pass {', '.join(QUESTION_METRICS)}.")
    for part, what, there in (("hasans-", "an answer", True), ("noans-", "no answer", False)):
        if answers is not None and metric.startswith(part) and all(bool(own) != there for own in answers):
            raise SettingsError(
                f"metric={metric!r}, but no question has {what}. Pass other data, or {metric[len(part) :]}."
            )
