"""The metrics against sacrebleu's and rouge-score's own values, the SQuAD definition, and hand-made tables."""

from __future__ import annotations

import re
import string
import sys

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from lorazor.data_settings import GenerationSettings
from lorazor.errors import MeasureError, SettingsError
from lorazor.measure.metrics import (
    METRICS,
    exact_match,
    final_number,
    metric_named,
    normalise_answer,
    numeric_match,
    teacher_forced_scores,
    text_scores,
    token_f1,
)

TEXTS = [
    "The Phoenix is a cheap French restaurant in the riverside area.",
    "",
    "Blue Spice serves food .",
    "no words in common",
    "a cat",
]
OTHER_TEXTS = ["The Phoenix is cheap.", "not empty", "Blue Spice serves Chinese food", "xyz", "a cat sat on the mat"]
REFERENCES = [
    [
        "The Phoenix is a cheap French place by the riverside.",
        "A cheap restaurant in the riverside area is The Phoenix.",
    ],
    ["It is family friendly."],
    ["Blue Spice serves Chinese food.", "Food is served at Blue Spice.", "Chinese food: Blue Spice."],
    ["zzz qqq"],
    ["a cat sat", "the cat"],
]


def in_documents(references):
    """References as sacrebleu wants them: one document per position, None where there is none."""
    longest = max(len(row) for row in references)
    return [[row[k] if k < len(row) else None for row in references] for k in range(longest)]


def corpus_value(metric, texts, references):
    scorer = sacrebleu.BLEU(force=True) if metric == "bleu" else sacrebleu.CHRF()
    return scorer.corpus_score(list(texts), in_documents(references)).score


@pytest.mark.parametrize("metric", ["bleu", "chrf"])
def test_corpus_metrics_equal_sacrebleu_with_differing_numbers_of_references(metric):
    scores = text_scores(metric, [TEXTS, OTHER_TEXTS], REFERENCES)
    expected = [corpus_value(metric, texts, REFERENCES) for texts in (TEXTS, OTHER_TEXTS)]
    assert scores.values == pytest.approx(expected, rel=1e-12)
    assert min(expected) > 1


words = st.lists(st.sampled_from("a b c the cat. sat, 3.5 mat Äö".split()), max_size=12).map(" ".join)
examples = st.lists(st.tuples(words, words, st.lists(words, min_size=1, max_size=3)), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(examples, st.sampled_from(["bleu", "chrf"]))
def test_any_corpus_equals_sacrebleu(rows, metric):
    first, second, references = (list(column) for column in zip(*rows, strict=True))
    scores = text_scores(metric, [first, second], references)
    expected = [corpus_value(metric, texts, references) for texts in (first, second)]
    assert scores.values == pytest.approx(expected, rel=1e-12, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=8), st.sampled_from(["bleu", "chrf"]))
def test_sums_of_any_resample_equal_the_corpus_of_that_resample(drawn, metric):
    scores = text_scores(metric, [TEXTS], REFERENCES)
    resampled = scores.combine(scores.statistics[0, drawn].sum(axis=0))
    expected = corpus_value(metric, [TEXTS[i] for i in drawn], [REFERENCES[i] for i in drawn])
    assert float(resampled) == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_per_example_bleu_and_chrf_are_sentence_scores():
    for metric, of_sentence in (("bleu", sacrebleu.sentence_bleu), ("chrf", sacrebleu.sentence_chrf)):
        expected = [
            [of_sentence(text, references).score for text, references in zip(texts, REFERENCES, strict=True)]
            for texts in (TEXTS, OTHER_TEXTS)
        ]
        got = text_scores(metric, [TEXTS, OTHER_TEXTS], REFERENCES).per_example
        assert got == pytest.approx(np.array(expected), rel=1e-12)
    assert got.shape == (2, 5)


def longest_common_subsequence(first, second):
    if not first or not second:
        return 0
    if first[-1] == second[-1]:
        return 1 + longest_common_subsequence(first[:-1], second[:-1])
    return max(longest_common_subsequence(first[:-1], second), longest_common_subsequence(first, second[:-1]))


def test_rouge_l_is_the_best_f1_of_common_subsequences():
    text, references = "red cat on big mat", ["big red dog on mat", "mat on cat"]
    f1 = [
        200 * longest_common_subsequence(text.split(), one.split()) / (len(text.split()) + len(one.split()))
        for one in references
    ]
    scores = text_scores("rougeL", [[text, "x"]], [references, ["y"]])
    assert scores.per_example[0].tolist() == pytest.approx([max(f1), 0])
    assert scores.values.tolist() == pytest.approx([max(f1) / 2])


@pytest.mark.parametrize("metric", ["rouge1", "rouge2", "rougeL"])
def test_rouge_equals_rouge_score_with_its_stemmer(metric):
    scorer = RougeScorer([metric], use_stemmer=True)
    expected = [
        max(100 * scorer.score(reference, text)[metric].fmeasure for reference in references)
        for text, references in zip(TEXTS, REFERENCES, strict=True)
    ]
    scores = text_scores(metric, [TEXTS], REFERENCES)
    assert scores.per_example[0].tolist() == pytest.approx(expected)
    assert scores.values[0] == pytest.approx(sum(expected) / 5)
    assert text_scores("rouge1", [["they jumped"]], [["they jump"]]).values[0] == pytest.approx(100)


def squad_words(text):
    """The SQuAD definition, told otherwise: blank out, in order, punctuation, articles, surplus space."""
    lowered = text.lower().translate(str.maketrans("", "", string.punctuation))
    return [word for word in re.split(r"\s+", re.sub(r"(?<!\w)(?:an?|the)(?!\w)", " ", lowered)) if word]


def squad_f1(text, reference):
    got, right = squad_words(text), squad_words(reference)
    if not got or not right:
        return float(got == right)
    n_same = sum(min(got.count(word), right.count(word)) for word in set(got))
    if n_same == 0:
        return 0.0
    precision, recall = n_same / len(got), n_same / len(right)
    return 2 * precision * recall / (precision + recall)


squad_text = st.lists(
    st.sampled_from(["The", "a", "An", "cat", "Cat's", "theatre", "dog,", "(dog)", "U.S.", "ein-an", "", "é", "!"]),
    max_size=6,
).map(" ".join)


@settings(max_examples=100, deadline=None)
@given(squad_text, st.lists(squad_text, min_size=1, max_size=3))
def test_exact_match_and_token_f1_are_the_squad_definition(text, references):
    assert exact_match(text, references) == 100 * max(squad_words(text) == squad_words(one) for one in references)
    assert token_f1(text, references) == pytest.approx(100 * max(squad_f1(text, one) for one in references))


def test_squad_normalisation_by_hand():
    assert normalise_answer("  The  U.S. theatre, an  A ") == "us theatre"
    assert exact_match("the Cat!", ["dog", "a cat"]) == 100
    assert token_f1("the big cat", ["big dog", "cat"]) == pytest.approx(200 / 3)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 + 4 = 7.", "7"),
        ("#### 42", "42"),
        ("5 apples\n#### $1,234.50 in all", "1234.5"),
        ("#### 42\n\nQuestion: what is 6 * 7?\n#### 13", "42"),
        ("####\n-8", "-8"),
        ("between 3-5", "5"),
        ("minus -$5", "-5"),
        ("about .5", "0.5"),
        ("1,000,000 people", "1000000"),
        ("12345678901234567891", "12345678901234567891"),
        ("none", None),
        ("12 #### none", None),
        ("", None),
    ],
)
def test_final_number(text, number):
    found = final_number(text)
    assert (None if found is None else float(found)) == (None if number is None else float(number))


def test_numbers_are_compared_as_numbers():
    assert numeric_match("it is 7.0", ["#### 7"]) == 100
    assert numeric_match("it is 8", ["#### 7", "8"]) == 100
    assert numeric_match("no idea", ["7"]) == 0
    assert numeric_match("12345678901234567891", ["12345678901234567890"]) == 0


def test_teacher_forced_metrics_by_hand():
    nll, tokens, correct = [[3.0, 5.0], [1.0, 1.0]], [2, 6], [[1, 3], [2, 5]]
    assert teacher_forced_scores("loss", nll, tokens, correct).values.tolist() == [1.0, 0.25]
    assert teacher_forced_scores("loss", nll, tokens, correct).per_example[0].tolist() == [1.5, 5 / 6]
    assert teacher_forced_scores("token-accuracy", nll, tokens, correct).values.tolist() == [0.5, 7 / 8]
    assert teacher_forced_scores("accuracy", nll, [1, 1], [[1, 0], [1, 1]]).values.tolist() == [0.5, 1.0]


def test_only_loss_is_a_cost():
    assert [metric.name for metric in METRICS.values() if not metric.higher_is_better] == ["loss"]
    assert not teacher_forced_scores("loss", [[1.0]], [1], [[1]]).higher_is_better
    assert text_scores("bleu", [["a"]], [["a"]]).higher_is_better


@pytest.mark.parametrize("name", [name for name, metric in METRICS.items() if metric.of == "text"])
def test_every_text_metric_is_100_for_the_right_text_and_strips(name):
    right = ["there were exactly #### 12 red cats", "he then paid #### 7 dollars for it"]
    scores = text_scores(name, [[f" \n{text}\n" for text in right], ["", ""]], [[f"{text} "] for text in right])
    assert scores.metric == name
    assert scores.values.tolist() == pytest.approx([100, 0])
    assert scores.per_example.shape == (2, 2)


def test_an_unknown_metric_lists_all():
    for call in (
        lambda: metric_named("blue"),
        lambda: text_scores("blue", [["a"]], [["a"]]),
        lambda: teacher_forced_scores("blue", [[1.0]], [1], [[1]]),
    ):
        with pytest.raises(SettingsError, match="metric='blue' is unknown") as caught:
            call()
        assert all(name in str(caught.value) for name in METRICS)


def test_a_metric_of_the_other_kind_is_refused():
    with pytest.raises(SettingsError, match="cannot be computed from generated text"):
        text_scores("loss", [["a"]], [["a"]])
    with pytest.raises(SettingsError, match="cannot be computed from teacher-forced losses"):
        teacher_forced_scores("bleu", [[1.0]], [1], [[1]])


@pytest.mark.parametrize(
    ("texts", "references", "message"),
    [
        ([["a", "b"]], [["a"], []], "example 1 needs a list of references"),
        ([["a"]], ["abc"], "example 0 needs a list of references, not 'abc'"),
        ([["a"], ["a", "b"]], [["a"]], "variant 1 has 2 texts, but 1 examples"),
        ([], [["a"]], "0 variants"),
        ([[]], [], "0 examples"),
    ],
)
def test_texts_that_do_not_fit_the_references_are_refused(texts, references, message):
    with pytest.raises(MeasureError, match=message):
        text_scores("bleu", texts, references)


def test_numeric_match_needs_a_number_in_the_references():
    with pytest.raises(MeasureError, match=r"example 1: no number in the references \['yes'\]"):
        text_scores("numeric-match", [["7", "7"]], [["7"], ["yes"]])


@pytest.mark.parametrize(
    ("metric", "nll", "tokens", "correct", "message"),
    [
        ("loss", [[1.0, 2.0]], [1], [[1, 1]], "do not fit"),
        ("loss", [1.0, 2.0], [1, 1], [1, 1], "do not fit"),
        ("loss", [[1.0, 2.0]], [1, 0], [[1, 0]], "example 1 has no answer tokens"),
        ("loss", [[1.0, float("nan")]], [1, 1], [[1, 0]], "example 1 of variant 0 is not a finite number"),
        ("accuracy", [[1.0, 2.0]], [1, 3], [[1, 2]], "example 1 has several answer tokens"),
    ],
)
def test_teacher_forced_numbers_that_cannot_be_are_refused(metric, nll, tokens, correct, message):
    with pytest.raises(MeasureError, match=message):
        teacher_forced_scores(metric, nll, tokens, correct)


def test_rouge_lsum_takes_lines_for_sentences_as_rouge_score_does():
    text, references = "The cat sat.\nA dog ran off.", ["A dog ran.\nThe cat sat down.", "no\nwords"]
    expected = RougeScorer(["rougeLsum"], use_stemmer=True).score_multi(references, text)["rougeLsum"].fmeasure
    assert text_scores("rougeLsum", [[text]], [references]).values[0] == pytest.approx(100 * expected)
    assert text_scores("rougeL", [[text]], [references]).values[0] < 100 * expected  # the order of lines


@pytest.mark.parametrize("tokenizer", ["zh", "char", "intl", "none"])
def test_bleu_takes_sacrebleus_tokenizers(tokenizer):
    texts, references = ["猫坐在垫子上。", "a cat, sat"], [["猫坐在垫子上面。"], ["a cat sat"]]
    expected = sacrebleu.corpus_bleu(texts, in_documents(references), tokenize=tokenizer, force=True).score
    assert text_scores("bleu", [texts], references, tokenizer).values[0] == pytest.approx(expected)


def official_answer(completion):
    """`extract_answer` of OpenAI's grade-school-math."""
    match = re.compile(r"#### (\-?[0-9\.\,]+)").search(completion)
    return match.group(1).strip().replace(",", "") if match else "[invalid]"


@pytest.mark.parametrize(
    "text",
    ["18", "#### 18", "x #### 18\n#### 19", "####18", "#### $18", "#### 18.", "#### 18.00", "#### -18", "#### 1,8"],
)
def test_gsm8k_answers_are_read_by_the_official_expression(text):
    reference = "9 * 2 = <<9*2=18>>18\n#### 18"
    is_right = official_answer(text) == official_answer(reference)
    assert text_scores("gsm8k-match", [[text]], [[reference]]).values[0] == 100 * is_right
    with pytest.raises(MeasureError, match="example 0: no answer after '#### '"):
        text_scores("gsm8k-match", [[text]], [["18"]])


def test_a_tokenizer_that_cannot_be_had_is_refused_at_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "MeCab", None)
    with pytest.raises(SettingsError, match=r"bleu_tokenizer='ja-mecab' cannot be had .*sacrebleu\[ja\]"):
        GenerationSettings(bleu_tokenizer="ja-mecab")
    with pytest.raises(SettingsError, match="bleu_tokenizer='klingon'"):
        GenerationSettings(bleu_tokenizer="klingon")  # pyright: ignore[reportArgumentType]
