"""Questions are counted as by the two official scripts of SQuAD, whose functions are transcribed here."""

from __future__ import annotations

import collections
import random
import re
import string

import pytest

from lorazor.errors import SettingsError
from lorazor.measure.questions import question_scores


def normalize(text):
    text = "".join(letter for letter in text.lower() if letter not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def official_f1(gold, prediction, is_squad_2):
    gold, prediction = normalize(gold).split(), normalize(prediction).split()
    n_same = sum((collections.Counter(gold) & collections.Counter(prediction)).values())
    if is_squad_2 and (len(gold) == 0 or len(prediction) == 0):
        return int(gold == prediction)
    if n_same == 0:
        return 0
    precision, recall = n_same / len(prediction), n_same / len(gold)
    return 2 * precision * recall / (precision + recall)


def official(predictions, answers, is_squad_2):
    """Of 1.1: exact_match and f1; of 2.0: exact, f1, and both of HasAns and NoAns."""
    exact, f1 = [], []
    for prediction, golds in zip(predictions, answers, strict=True):
        if is_squad_2:
            golds = [gold for gold in golds if normalize(gold)] or [""]
        exact.append(max(int(normalize(gold) == normalize(prediction)) for gold in golds))
        f1.append(max(official_f1(gold, prediction, is_squad_2) for gold in golds))
    found = {}
    for part, chosen in (("", None), ("hasans-", True), ("noans-", False)):
        rows = [place for place, golds in enumerate(answers) if chosen is None or bool(golds) == chosen]
        for name, values in (("exact-match", exact), ("token-f1", f1)):
            if rows:
                found[part + name] = 100.0 * sum(values[place] for place in rows) / len(rows)
    return found


WORDS = ["the", "The", "a", "Köln", "in", "Köln,", "1900.", "!", "", "an answer"]


@pytest.mark.parametrize("is_squad_2", [False, True])
def test_metrics_equal_the_official_scripts(is_squad_2):
    draw = random.Random(0)

    def text():
        return " ".join(draw.choices(WORDS, k=draw.randint(0, 3)))

    for _ in range(60):
        n = draw.randint(2, 12)
        answers = [tuple(text() or "the" for _ in range(draw.randint(1, 3))) for _ in range(n)]
        if is_squad_2:
            answers[: n // 2] = [()] * (n // 2)
        texts = [[text() for _ in range(n)] for _ in range(2)]
        expected = [official(row, answers, is_squad_2) for row in texts]
        for metric in expected[0]:
            values = question_scores(metric, texts, answers, is_squad_2).values
            assert values == pytest.approx([one[metric] for one in expected]), metric


def test_answers_that_vanish():
    assert question_scores("token-f1", [["the"]], [["The"]], False).values == [0]
    assert question_scores("exact-match", [["the"]], [["The"]], False).values == [100]
    assert question_scores("token-f1", [["the", ""]], [["The"], []], True).values == [100]
    with pytest.raises(SettingsError, match="no question has no answer. Pass other data, or token-f1"):
        question_scores("noans-token-f1", [["x"]], [["x"]], False)
    with pytest.raises(SettingsError, match="'bleu' is not one of questions. Pass loss, exact-match"):
        question_scores("bleu", [["x"]], [["x"]], False)
