"""Foreign text is shown, and does nothing."""

from __future__ import annotations

import math
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorazor.measure.stats import Interval
from lorazor.report.words import (
    bounds,
    count,
    most,
    new_words,
    number,
    share,
    short,
    short_names,
    signed,
    visible,
    worse,
)

NAN = math.nan


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred", "␛[31mred"),
        ("\x9b31mred", "\\u009b31mred"),  # the one-character form of the same escape
        ("a\r\nb\tc\n", "a\nb\tc\n"),
        ("a\rb\x00\x7f", "a␍b␀␡"),
        ("abc\u202edef\u2066", "abc\\u202edef\\u2066"),  # turns the reading direction around
        ("half \ud83d of a pair", "half \ufffd of a pair"),
        ("naïve 日本 👩‍💻", "naïve 日本 👩‍💻"),
    ],
)
def test_control_characters_become_visible(text, shown):
    assert visible(text) == shown


@given(st.text(st.characters(exclude_categories=())))
def test_what_is_visible_has_no_control_character_and_can_be_written(text):
    shown = visible(text)
    assert not [one for one in shown if unicodedata.category(one) == "Cc" and one not in "\n\t"]
    assert shown.encode().decode() == visible(shown)


def test_numbers_of_a_metric_have_the_same_digits():
    assert [number(value, "loss") for value in (1.33612, 12.5)] == ["1.3361", "12.5000"]
    assert [number(value, "bleu") for value in (60.5, None, NAN)] == ["60.50", "–", "–"]
    assert [signed(value, "loss") for value in (0.01, -0.01, 0)] == ["+0.0100", "−0.0100", "+0.0000"]
    assert bounds(Interval(0, -0.5, 0.25, 0.1), "rougeL") == "−0.50 to +0.25"
    assert [worse(lost, "loss") for lost in (0.01, -0.01)] == ["worse by 0.0100", "better by 0.0100"]
    assert [most(lost, "loss") for lost in (0.01, -0.01)] == [
        "at most 0.0100 worse (95 %)",
        "at least 0.0100 better (95 %)",
    ]
    assert (count(1234567), share(1, 3), share(1, 0), share(None, 3)) == ("1,234,567", "33.3 %", "–", "–")
    assert (short(-0.00012345), short(None)) == ("−0.000123", "–")


def test_names_are_as_short_as_they_can_be_told_apart():
    assert short_names(["a/adapter", "runs/b/adapter", "base"]) == ["a/adapter", "b/adapter", "base"]
    assert short_names(["runs/a", "runs/b"]) == ["a", "b"] and short_names([]) == []


def test_new_words_are_those_that_the_other_text_lacks():
    pieces = new_words("the red  cat sat", "the cat sat down")
    assert pieces == [("the", False), (" red", True), ("  cat sat", False)]


@given(st.text(), st.text())
def test_new_words_lose_nothing(text, other):
    assert "".join(piece for piece, _ in new_words(text, other)) == text
