"""Which units stay, against exhaustive search on small cases."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorazor.errors import BudgetError, MeasureError
from lorazor.select.search import Family, Unit, Units, smallest_passing

pairs = st.lists(st.tuples(st.integers(-5, 5), st.integers(1, 6)), min_size=1, max_size=6)
some_positive = pairs.filter(lambda rows: any(score > 0 for score, _ in rows))


def family(rows, by="site", n_fixed=0) -> Family:
    """Units of given (score, parameters), one part each; `n_fixed` parameters that always stay."""
    movable = tuple(Unit(str(index), (index,), size) for index, (_, size) in enumerate(rows))
    fixed = (len(rows),) if n_fixed else ()
    values = [float(score) for score, _ in rows] + [-7.0] * len(fixed)
    return Family.of(Units(by, movable, fixed, n_fixed), values)


def subsets(n):
    return [chosen for size in range(n + 1) for chosen in combinations(range(n), size)]


@given(some_positive)
def test_candidates_are_nested_and_end_in_the_full_adapter(rows):
    candidates = family(rows).candidates
    assert [len(one) for one in candidates] == list(range(1, len(rows) + 1))
    for kept in candidates:
        worst = min((rows[unit][0] / rows[unit][1], -unit) for unit in kept)
        assert list(kept) == sorted(kept)
        left_out = set(range(len(rows))) - set(kept)
        assert all((rows[unit][0] / rows[unit][1], -unit) < worst for unit in left_out)  # ties keep the earlier one
    assert all(set(smaller) < set(larger) for smaller, larger in zip(candidates, candidates[1:], strict=False))


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_of_equal_sizes_every_candidate_is_the_best_of_its_size(scores):
    for kept in family([(score, 3) for score in scores]).candidates:
        assert sum(scores[unit] for unit in kept) == max(map(sum, combinations(scores, len(kept))))


def test_scores_count_per_parameter():
    assert family([(6, 10), (4, 2), (5, 10), (0, 1)]).candidates == ((1,), (0, 1), (0, 1, 2), (0, 1, 2, 3))


@given(pairs)
def test_the_first_layers_whatever_their_scores(rows):
    assert family(rows, "prefix").candidates == tuple(tuple(range(n)) for n in range(1, len(rows) + 1))
    assert family(rows, "prefix", 9).candidates == tuple(tuple(range(n)) for n in range(len(rows) + 1))


@given(pairs)
def test_windows_are_the_best_neighbours_of_every_length(rows):
    scores = [score for score, _ in rows]
    for length, kept in enumerate(family(rows, "window").candidates, start=1):
        sums = [sum(scores[start : start + length]) for start in range(len(rows) - length + 1)]
        assert kept == tuple(range(kept[0], kept[0] + length)) and kept[0] == sums.index(max(sums))


def test_an_adapter_that_is_worth_nothing_is_refused():
    with pytest.raises(MeasureError, match="no better than its base"):
        family([(0, 1), (-1, 1)])


@given(some_positive, st.integers(0, 25), st.sampled_from([0, 4]))
def test_a_budget_of_ranked_units_is_filled_greedily(rows, budget, n_fixed):
    """It holds, nothing of worth that fits is left out, and nothing stays that was out of turn."""
    positive = [unit for unit, (score, _) in enumerate(rows) if score > 0]
    least = n_fixed + min(rows[unit][1] for unit in positive)
    if budget < least:
        with pytest.raises(BudgetError, match=f"The smallest adapter by site has {least}. Pass that or more"):
            family(rows, "site", n_fixed).within(budget)
        return
    kept = family(rows, "site", n_fixed).within(budget)
    left = budget - n_fixed - sum(rows[unit][1] for unit in kept)
    assert kept and left >= 0 and set(kept) <= set(positive)

    def turn(unit):
        return -rows[unit][0] / rows[unit][1], unit

    for unit in set(positive) - set(kept):
        before = sum(rows[other][1] for other in kept if turn(other) < turn(unit))
        assert before + rows[unit][1] > budget - n_fixed


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=6).filter(lambda scores: max(scores) > 0), st.integers(1, 6))
def test_of_equal_sizes_a_budget_gets_the_best_of_all_subsets(scores, n_kept):
    kept = family([(score, 3) for score in scores]).within(3 * n_kept + 2)
    every = (sum(scores[unit] for unit in chosen) for chosen in subsets(len(scores)) if len(chosen) <= n_kept)
    assert sum(scores[unit] for unit in kept) == max(every)


@given(pairs, st.integers(0, 25), st.sampled_from([0, 4]))
def test_a_budget_of_a_window_gets_the_best_of_all_windows(rows, budget, n_fixed):
    windows = {
        tuple(range(a, b)): sum(score for score, _ in rows[a:b])
        for a in range(len(rows))
        for b in range(a + 1, len(rows) + 1)
        if n_fixed + sum(size for _, size in rows[a:b]) <= budget
    }
    if windows:
        assert windows[family(rows, "window", n_fixed).within(budget)] == max(windows.values())
    else:
        least = n_fixed + min(size for _, size in rows)
        with pytest.raises(BudgetError, match=f"window has {least}"):
            family(rows, "window", n_fixed).within(budget)


@given(pairs, st.integers(0, 25), st.sampled_from([0, 4]))
def test_a_budget_of_first_layers_gets_the_most_that_fit(rows, budget, n_fixed):
    first = 0 if n_fixed else 1
    sizes = {n: n_fixed + sum(size for _, size in rows[:n]) for n in range(first, len(rows) + 1)}
    fitting = [n for n, size in sizes.items() if size <= budget]
    if fitting:
        assert family(rows, "prefix", n_fixed).within(budget) == tuple(range(max(fitting)))
    else:
        with pytest.raises(BudgetError, match=f"prefix has {sizes[first]}"):
            family(rows, "prefix", n_fixed).within(budget)


def asked_of(n, threshold, width):
    """What is found for answers that are monotone, and what was asked in each round."""
    rounds = []

    def passes(asked):
        rounds.append(list(asked))
        return [index >= threshold for index in asked]

    return smallest_passing(n, passes, width), rounds


@settings(deadline=None, max_examples=400)
@given(st.integers(1, 200), st.integers(0, 199), st.sampled_from([1, 3]))
def test_the_smallest_that_passes_is_found_with_few_questions(n, threshold, width):
    threshold, resolution = min(threshold, n - 1), max(1, n // 64)
    found, rounds = asked_of(n, threshold, width)
    asked = [index for one in rounds for index in one]
    first = next(index for index in range(n) if index >= threshold)  # exhaustive
    if n < 128:
        assert found == (None if first == n - 1 else first)
    assert first <= (n - 1 if found is None else found) < first + resolution
    assert len(set(asked)) == len(asked) and n - 1 not in asked  # none twice, and the largest passes unasked
    assert all(one == sorted(one) and 1 <= len(one) <= width for one in rounds)
    assert len(rounds) <= (math.ceil(math.log2(n)) if width == 1 else math.ceil(math.log(n, 4)) + 1)


@given(st.lists(st.booleans(), min_size=1, max_size=60), st.sampled_from([1, 3]))
def test_what_is_found_passed_and_the_next_smaller_did_not(answers, width):
    """Also where answers are not monotone."""
    found = smallest_passing(len(answers), lambda asked: [answers[index] for index in asked], width)
    if found is not None:
        assert answers[found] and (found == 0 or not answers[found - 1])
    elif len(answers) > 1:
        assert not answers[-2]
