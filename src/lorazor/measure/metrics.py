"""The metrics: what each is, and how predictions turn into `Scores`.

Teacher-forced metrics come from losses and token counts, those of labels from what was predicted (`labels.py`), text
metrics from generated text. `loss` is in nats per answer token, metrics of labels and `token-accuracy` are fractions of
1, and every text metric is in percent, 0..100. This module never imports torch.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from itertools import zip_longest
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from lorazor.errors import MeasureError, SettingsError
from lorazor.measure.stats import Array, Scores, ratio

_PUNCTUATION = frozenset(string.punctuation)
_ANSWER_OF_GSM8K = re.compile(r"#### (\-?[0-9\.\,]+)")  # as it is in OpenAI's grade-school-math
_NUMBER = re.compile(r"(?:(?<![\w.])[-+])?(?:[0-9]+(?:\.[0-9]+)?|(?<![\w.])\.[0-9]+)")


@dataclass(frozen=True)
class Metric:
    """What there is to know about a metric before computing it; docs/data.md says what each of them is."""

    name: str
    of: Literal["anything", "tokens", "classes", "numbers", "text", "questions"]
    higher_is_better: bool

    @property
    def needs_text(self) -> bool:
        """Whether it compares written answers."""
        return self.of in ("text", "questions")


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("loss", "anything", False),
        Metric("token-accuracy", "tokens", True),
        Metric("accuracy", "classes", True),
        Metric("f1", "classes", True),
        Metric("matthews", "classes", True),
        Metric("pearson", "numbers", True),
        Metric("spearman", "numbers", True),
        Metric("bleu", "text", True),
        Metric("chrf", "text", True),
        Metric("rouge1", "text", True),
        Metric("rouge2", "text", True),
        Metric("rougeL", "text", True),
        Metric("rougeLsum", "text", True),
        Metric("exact-match", "text", True),
        Metric("token-f1", "text", True),
        Metric("hasans-exact-match", "questions", True),
        Metric("hasans-token-f1", "questions", True),
        Metric("noans-exact-match", "questions", True),
        Metric("noans-token-f1", "questions", True),
        Metric("numeric-match", "text", True),
        Metric("gsm8k-match", "text", True),
    )
}

CORRELATIONS = ("matthews", "pearson", "spearman")
"""Metrics from -1 to 1."""


def metric_named(name: str) -> Metric:
    """Look a metric up.

    Raises:
        SettingsError: no metric has this name.
    """
    if name not in METRICS:
        raise SettingsError(f"metric={name!r} is unknown. Pass one of {', '.join(METRICS)}.")
    return METRICS[name]


def teacher_forced_scores(metric: str, nll_nats: ArrayLike, n_tokens: ArrayLike, n_correct: ArrayLike) -> Scores:
    """A metric of a sweep's per-example numbers.

    Args:
        metric: `loss`, `token-accuracy` or `accuracy`.
        nll_nats: (n_variants, n_examples), summed over the answer tokens of an example.
        n_tokens: (n_examples,), answer tokens, at least 1.
        n_correct: (n_variants, n_examples), answer tokens (for `accuracy`: labels) predicted right.
    Raises:
        SettingsError: the metric is unknown or needs generated text.
        MeasureError: shapes that do not fit, an example without answer tokens, a number that is not finite.
    """
    _check_kind(metric, needs_text=False)
    losses, tokens, correct = (np.asarray(numbers, dtype=np.float64) for numbers in (nll_nats, n_tokens, n_correct))
    if losses.ndim != 2 or tokens.shape != losses.shape[1:] or correct.shape != losses.shape:
        raise MeasureError(
            f"{metric}: nll_nats {losses.shape}, n_tokens {tokens.shape} and n_correct {correct.shape} do not fit. "
            "Pass (n_variants, n_examples), (n_examples,) and (n_variants, n_examples)."
        )
    if (tokens < 1).any():
        raise MeasureError(f"{metric}: example {int(np.argmax(tokens < 1))} has no answer tokens. Leave it out.")
    if metric == "accuracy" and (correct > 1).any():
        example = int(np.argmax((correct > 1).any(axis=0)))
        raise MeasureError(
            f"accuracy: example {example} has several answer tokens, but accuracy counts one label per example. "
            "Use token-accuracy or exact-match."
        )
    above = losses if metric == "loss" else correct
    below = np.ones_like(tokens) if metric == "accuracy" else tokens
    statistics = np.stack(np.broadcast_arrays(above, below), axis=-1)
    return Scores(metric, METRICS[metric].higher_is_better, statistics, ratio)


def text_scores(
    metric: str, texts: Sequence[Sequence[str]], references: Sequence[Sequence[str]], bleu_tokenizer: str = "13a"
) -> Scores:
    """A metric of generated texts. Texts and references are stripped first.

    Args:
        metric: name of a text metric.
        texts: (n_variants, n_examples), what was generated.
        references: (n_examples, one or more each), right answers; their number may vary.
        bleu_tokenizer: how BLEU takes words apart, by sacrebleu's name.
    Raises:
        SettingsError: the metric is unknown or needs no text.
        MeasureError: an example without references, or numbers of examples that differ.
    """
    _check_kind(metric, needs_text=True)
    if not texts or not references:
        raise MeasureError(
            f"{metric}: {len(texts)} variants and {len(references)} examples. Pass at least one of each."
        )
    for variant, row in enumerate(texts):
        if len(row) != len(references):
            raise MeasureError(
                f"{metric}: variant {variant} has {len(row)} texts, but {len(references)} examples have references."
            )
    for example, right_answers in enumerate(references):
        if isinstance(right_answers, str) or len(right_answers) == 0:
            raise MeasureError(
                f"{metric}: example {example} needs a list of references, not {right_answers!r:.60}. "
                "Add references, or use a metric that needs no text, as loss."
            )
    texts = [[text.strip() for text in row] for row in texts]
    references = [[reference.strip() for reference in row] for row in references]
    if metric in ("bleu", "chrf"):
        return _sacrebleu_scores(metric, texts, references, bleu_tokenizer)
    return Scores(metric, True, _mean_statistics(metric, texts, references), ratio)


def normalise_answer(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces, as SQuAD's evaluation script does."""
    without_punctuation = "".join(letter for letter in text.lower() if letter not in _PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", without_punctuation).split())


def exact_match(text: str, references: Sequence[str]) -> float:
    """100 if the text equals a reference after `normalise_answer`, else 0."""
    return 100.0 * (normalise_answer(text) in {normalise_answer(reference) for reference in references})


def token_f1(text: str, references: Sequence[str]) -> float:
    """F1 of the words after `normalise_answer`, best reference, percent.

    Where the text or the reference has no words left, 100 if neither has, else 0 (as SQuAD 2.0).
    """
    words, best = normalise_answer(text).split(), 0.0
    for reference in references:
        right = normalise_answer(reference).split()
        n_common = sum((Counter(words) & Counter(right)).values())
        score = 200.0 * n_common / (len(words) + len(right)) if words and right else 100.0 * (words == right)
        best = max(best, score)
    return best


def final_number(text: str) -> Decimal | None:
    """The last number of a text, or of the line after its first `####`; None if there is none.

    Commas and dollar signs are dropped first. Only that line counts, because a model that goes
    on after its answer writes further numbers.
    """
    _, marker, answer = text.partition("####")
    line = (answer.strip().splitlines() or [""])[0] if marker else text
    numbers = _NUMBER.findall(line.replace(",", "").replace("$", ""))
    return Decimal(numbers[-1]) if numbers else None


def numeric_match(text: str, references: Sequence[str]) -> float:
    """100 if the final number of the text is that of a reference, else 0 (as for GSM8K).

    Raises:
        MeasureError: no reference holds a number.
    """
    answers = {final_number(reference) for reference in references} - {None}
    if not answers:
        raise MeasureError(f"no number in the references {list(references)!r:.80}")
    return 100.0 * (final_number(text) in answers)


def gsm8k_match(text: str, references: Sequence[str]) -> float:
    """100 if the first number after `#### ` is that of a reference, as text without commas; else 0.

    A text without one is wrong. Two forms of a number, 18 and 18.00, are two answers.

    Raises:
        MeasureError: no reference has one.
    Source: `grade_school_math/dataset.py` of OpenAI's grade-school-math.
    """
    found = [_ANSWER_OF_GSM8K.search(one) for one in (text, *references)]
    own, *right = (None if match is None else match[1].strip().replace(",", "") for match in found)
    if not any(right):
        raise MeasureError(f"no answer after '#### ' in the references {list(references)!r:.80}")
    return 100.0 * (own is not None and own in right)


def _mean_metric(name: str) -> Callable[[str, Sequence[str]], float]:
    """The metric of one text whose mean over examples is the metric of all."""
    if not name.startswith("rouge"):
        return {
            "exact-match": exact_match,
            "token-f1": token_f1,
            "numeric-match": numeric_match,
            "gsm8k-match": gsm8k_match,
        }[name]
    # rouge-score drops every character outside a..z and 0..9: other scripts score 0
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import DefaultTokenizer

    # stemming is most of the cost, and every text meets several references
    stemmed_words = lru_cache(maxsize=1024)(DefaultTokenizer(use_stemmer=True).tokenize)
    scorer = RougeScorer([name], tokenizer=SimpleNamespace(tokenize=stemmed_words))
    return lambda text, references: 100.0 * scorer.score_multi(references, text)[name].fmeasure


def _sacrebleu_scores(
    name: str, texts: Sequence[Sequence[str]], references: Sequence[Sequence[str]], tokenizer: str
) -> Scores:
    """What sacrebleu itself sums for a corpus, and its own formulas; BLEU of one example has its effective order."""
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    # sacrebleu wants one document per reference, and None where an example has fewer of them
    documents: Any = list(zip_longest(*references))
    # force only silences a warning about tokenised text
    corpus = (
        BLEU(force=True, tokenize=tokenizer, references=documents) if name == "bleu" else CHRF(references=documents)
    )
    # private, but where sacrebleu hands out and takes in statistics; its own significance tests use both
    statistics = np.array([corpus._extract_corpus_statistics(row, None) for row in texts], dtype=np.float64)

    def combined(scorer: BLEU | CHRF) -> Callable[[Array], Array]:
        return lambda sums: np.apply_along_axis(
            lambda row: scorer._compute_score_from_stats(row.tolist()).score, -1, sums
        )

    sentence = combined(BLEU(effective_order=True, tokenize=tokenizer)) if name == "bleu" else None
    return Scores(name, True, statistics, combined(corpus), sentence)


def _mean_statistics(name: str, texts: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> Array:
    """(n_variants, n_examples, 2): the score and 1."""
    score = _mean_metric(name)
    values = np.ones((len(texts), len(references), 2))
    for example, right_answers in enumerate(references):
        generated = [row[example] for row in texts]
        # neighbouring boundaries often write the same text: score each text once
        try:
            known = {text: score(text, right_answers) for text in dict.fromkeys(generated)}
        except MeasureError as error:
            raise MeasureError(
                f"{name}: example {example}: {error}. Mend it, leave it out, or use another metric."
            ) from error
        values[:, example, 0] = [known[text] for text in generated]
    return values


def _check_kind(name: str, needs_text: bool) -> None:
    known = [metric.name for metric in METRICS.values() if metric.of == "text"]
    if not needs_text:
        known = ["loss", "token-accuracy", "accuracy"]
    if metric_named(name).name not in known:
        allowed = ", ".join(known)
        source = "generated text" if needs_text else "teacher-forced losses"
        raise SettingsError(f"metric={name!r} cannot be computed from {source}. Pass one of {allowed}.")
