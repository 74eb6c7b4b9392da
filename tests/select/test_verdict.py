"""Margins and verdicts against independent t tests, score intervals and simulation."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lorazor.data.examples import Example
from lorazor.errors import MeasureError, SettingsError
from lorazor.measure.metrics import teacher_forced_scores
from lorazor.measure.stats import Scores
from lorazor.select.verdict import Margin, Verdict, judge, last_shown, least_examples, least_margin
from lorazor.workflow.verdicts import check_can_decide, what_can_be_decided


def means(values, metric="rougeL", higher_is_better=True) -> Scores:
    values = np.asarray(values, dtype=float)
    statistics = np.stack([values, np.ones_like(values)], -1)
    return Scores(metric, higher_is_better, statistics, lambda sums: sums[..., 0] / sums[..., 1])


def answers(lost: int, won: int, n: int, repeat: int = 1) -> Scores:
    """Accuracy of a smaller adapter that loses and wins so many of n answers."""
    right = np.zeros((2, n))
    right[1, :lost], right[0, lost : lost + won] = 1, 1
    right[:, n // 2 + 1 :] = 1  # both
    assert lost + won <= n // 2
    right = np.repeat(right, repeat, axis=1)
    return teacher_forced_scores("accuracy", np.ones_like(right), np.ones(right.shape[1]), right)


@pytest.mark.parametrize(
    ("text", "margin", "words"),
    [
        ("2%", Margin("loss", share=0.02), "2 % of the gain in loss"),
        (" 0.5 % ", Margin("loss", share=0.005), "0.5 % of the gain in loss"),
        ("rougeL=0.5", Margin("rougeL", amount=0.5), "0.5 of rougeL"),
        (" loss = 1e-2 ", Margin("loss", amount=0.01), "0.01 of loss"),
        ("loss=3", Margin("loss", amount=3.0), "3 of loss"),
        ("exact-match=99", Margin("exact-match", amount=99.0), "99 of exact-match"),
    ],
)
def test_margins(text, margin, words):
    assert Margin.parse(text) == margin and str(margin) == words


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no margin. Pass a share"),
        ("2", "is no margin"),
        ("-2%", "is no margin"),
        ("rougeL", "is no margin"),
        ("rougeL=", "is no margin"),
        ("accuracy=2%", "is no margin"),
        ("0%", "not between 0 and 100 %"),
        ("100%", "not between 0 and 100 %"),
        ("1.2.3%", "holds '1.2.3', which is no number"),
        ("loss=1e", "holds '1e', which is no number"),
        ("loss=0", "above 0"),
        ("loss=-0.1", "above 0"),
        ("loss=1e999", "above 0"),
        ("taste=1", "metric='taste' is unknown"),
        ("accuracy=2", "accuracy never differs by more than 1, .* such as accuracy=0.01"),
        ("accuracy=1", "anything would do"),
        ("rougeL=100", "rougeL never differs by more than 100"),
    ],
)
def test_what_is_no_margin_is_refused(text, message):
    with pytest.raises(SettingsError, match=message):
        Margin.parse(text)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("margin", [0.05, 0.3, 0.6, 1.2])
def test_of_means_the_outcome_is_that_of_two_t_tests(seed, margin):
    generator = np.random.default_rng(seed)
    full = generator.normal(50, 20, 80)
    scores = means([full - generator.normal(0.5, 1.5, 80), full])
    worse = scores.statistics[1, :, 0] - scores.statistics[0, :, 0]
    found = judge(scores, Margin("rougeL", amount=margin), range(80))
    below = stats.ttest_1samp(worse, margin, alternative="less")
    above = stats.ttest_1samp(worse, margin, alternative="greater")
    if min(abs(below.pvalue - 0.05), abs(above.pvalue - 0.05)) > 0.04:  # else the bootstrap may see it otherwise
        expected = "shown" if below.pvalue < 0.05 else "refuted" if above.pvalue < 0.05 else "undecided"
        assert found.outcome == expected
    assert found.lost == pytest.approx(worse.mean()) and found.margin == margin
    assert (found.value, found.full_value) == pytest.approx(tuple(scores.values))
    upper = worse.mean() + stats.t.ppf(0.95, 79) * worse.std(ddof=1) / 80**0.5
    assert upper - 1e-9 <= found.lost_at_most <= upper + 0.8 * worse.std(ddof=1) / 80**0.5


@pytest.mark.parametrize("turned", [False, True])
def test_a_verdict_turns_with_the_direction_of_the_metric(turned):
    values = np.random.default_rng(0).normal(50, 3, (2, 60))
    values[0] = values[1] + (5 if turned else -5) + np.random.default_rng(1).normal(size=60)
    margin = Margin("rougeL", amount=1.0)
    assert judge(means(values), margin, range(60)).outcome == ("shown" if turned else "refuted")
    cost = judge(means(values, higher_is_better=False), margin, range(60))
    assert cost.outcome == ("refuted" if turned else "shown")
    assert cost.lost == pytest.approx(5 if turned else -5, abs=0.5)


def loss_scores(seed=0, n=80, lost=0.01, gain=1.0) -> tuple[Scores, np.ndarray]:
    generator = np.random.default_rng(seed)
    tokens = generator.integers(3, 20, n)
    full = generator.gamma(3, 0.4, n)
    base = full + gain * generator.lognormal(-0.125, 0.5, n)
    nats = np.stack([full + lost + generator.normal(0, 0.02, n), full, base]) * tokens
    return teacher_forced_scores("loss", nats, tokens, np.zeros_like(nats)), tokens


def test_a_share_of_the_gain_is_tested_with_the_gain_of_the_same_examples():
    """Fieller: the statistic is linear in both, and its error holds that of the gain."""
    scores, tokens = loss_scores(lost=0.02)
    smaller, full, base = scores.statistics[:, :, 0]
    found = judge(scores, Margin("loss", share=0.02), range(80))
    excess = smaller - full - 0.02 * (base - full)
    mean = excess.sum() / tokens.sum()
    error = (80 / 79 * ((excess - mean * tokens) ** 2).sum()) ** 0.5 / tokens.sum()
    gain = (base - full).sum() / tokens.sum()
    assert found.margin == pytest.approx(0.02 * gain) and found.base_value == pytest.approx(scores.values[2])
    assert found.lost == pytest.approx((smaller - full).sum() / tokens.sum())
    half = stats.t.ppf(0.95, 79) * error  # and no more than so much for skewness: the gain has a long tail
    assert mean + half - 1e-9 <= found.lost_at_most - found.margin <= mean + half + 0.5 * error
    assert mean - half - 1.5 * error <= found.lost_at_least - found.margin <= mean - half + 1e-9


@pytest.mark.parametrize(("lost", "outcome"), [(0.0, "shown"), (0.02, "undecided"), (0.08, "refuted")])
def test_a_planted_loss_is_found(lost, outcome):
    found = judge(loss_scores(lost=lost)[0], Margin("loss", share=0.02), range(80))
    assert found.outcome == outcome and found.sentence.split(".")[-2].endswith(outcome) is (outcome != "undecided")
    assert outcome in found.table and json.loads(json.dumps(found.to_document()))["outcome"] == outcome


def test_an_adapter_that_gains_nothing_has_no_share_to_give():
    scores, _ = loss_scores(gain=1.0)
    turned = dataclasses.replace(scores, statistics=scores.statistics[[0, 2, 1]])
    for bad in (turned, dataclasses.replace(scores, statistics=scores.statistics[[0, 1, 1]])):
        with pytest.raises(MeasureError, match=r"gains nothing over its base model .* --margin loss=0.01"):
            judge(bad, Margin("loss", share=0.02), range(80))
    assert judge(means([[1, 2, 4], [1, 2, 3]]), Margin("rougeL", amount=0.5), range(3)).outcome == "undecided"


def test_numbers_that_do_not_fit_are_refused():
    scores, _ = loss_scores()
    with pytest.raises(MeasureError, match="3 variants to judge, but a margin of 0.1 of loss takes 2"):
        judge(scores, Margin("loss", amount=0.1), range(80))
    with pytest.raises(MeasureError, match="1 independent example"):
        judge(scores, Margin("loss", share=0.02), ["one prompt"] * 80)


def test_examples_of_one_prompt_count_once():
    scores, _ = loss_scores(lost=0.012)
    prompts = [index for index in range(80) for _ in range(3)]
    three = dataclasses.replace(scores, statistics=np.repeat(scores.statistics, 3, axis=1))
    once, thrice = (
        judge(scores, Margin("loss", share=0.02), range(80)),
        judge(three, Margin("loss", share=0.02), prompts),
    )
    assert (thrice.n_examples, thrice.n_clusters) == (240, 80)
    assert thrice.lost_at_most == pytest.approx(once.lost_at_most)
    apart = judge(three, Margin("loss", share=0.02), range(240))
    assert apart.lost_at_most < once.lost_at_most
    margin = Margin("accuracy", amount=0.08)
    one, many = (
        judge(answers(2, 1, 60), margin, range(60)),
        judge(answers(2, 1, 60, 10), margin, np.repeat(range(60), 10)),
    )
    assert many.lost_at_most == pytest.approx(one.lost_at_most) and many.n_clusters == 60
    one, many = (
        judge(answers(0, 0, 60), margin, range(60)),
        judge(answers(0, 0, 60, 9), margin, np.repeat(range(60), 9)),
    )
    assert many.lost_at_most == pytest.approx(one.lost_at_most) == 1 - 0.05 ** (1 / 60)


@pytest.mark.parametrize("metric", ["loss", "rougeL", "accuracy", "bleu"])
def test_no_difference_at_all_shows_nothing_beyond_the_number_of_examples(metric):
    """Also where the numbers differ by rounding."""
    generator = np.random.default_rng(0)
    full = generator.integers(0, 2, 30).astype(float) if metric == "accuracy" else generator.uniform(10, 90, 30)
    for smaller in (full, full * (1 + 1e-15 * generator.choice([-1, 1], 30)) if metric != "accuracy" else full):
        scores = means([smaller, full], metric, metric != "loss")
        if metric == "bleu":
            statistics = np.concatenate([scores.statistics, scores.statistics[..., 1:]], -1)
            scores = dataclasses.replace(scores, statistics=statistics)
        found = judge(scores, Margin(metric, amount=0.01), range(30))
        assert found.outcome == "undecided" and found.lost == pytest.approx(0, abs=1e-12)
        if metric in ("rougeL", "accuracy"):
            largest = 100 if metric == "rougeL" else 1
            assert found.lost_at_most == pytest.approx(largest * (1 - 0.05 ** (1 / 30)))
            assert found.n_needed == least_examples(0.01, largest)
        else:
            assert found.n_needed in (None, least_examples(0.01, 100)) and "keep more" not in found.sentence


@pytest.mark.parametrize(("lost", "won", "n"), [(0, 0, 100), (1, 0, 100), (4, 2, 100), (9, 9, 300), (2, 0, 40)])
@pytest.mark.parametrize("margin", [0.02, 0.04, 0.08])
def test_of_right_and_wrong_answers_the_outcome_is_that_of_the_score_test(lost, won, n, margin):
    found = judge(answers(lost, won, n), Margin("accuracy", amount=margin), range(n))
    if won:
        grid = np.linspace(0, (1 - margin) / 2, 20001)[1:-1]  # shares of what is won, the likeliest by brute force
        likelihood = (
            lost * np.log(grid + margin) + won * np.log(grid) + (n - lost - won) * np.log(1 - 2 * grid - margin)
        )
        best = grid[np.argmax(likelihood)]
        score = (lost - won - n * margin) / (n * (2 * best + margin - margin**2)) ** 0.5
        is_shown = score < -stats.norm.ppf(0.96)
    else:
        is_shown = stats.binom.cdf(lost, n, margin) < 0.05
    assert (found.outcome == "shown") == is_shown
    percent = means(100 * answers(lost, won, n).statistics[..., 0], "exact-match")
    assert judge(percent, Margin("exact-match", amount=100 * margin), range(n)).outcome == found.outcome


@given(st.integers(1, 3000))
def test_the_least_margin_is_what_no_changed_answer_shows(n):
    least = least_margin("accuracy", n)
    assert least is not None and (1 - least) ** n == pytest.approx(0.05)
    assert least_margin("exact-match", n) == pytest.approx(100 * least)
    assert least_margin("loss", n) is least_margin("rougeL", n) is least_margin("bleu", n) is None


@given(st.floats(0.001, 0.5))
def test_the_fewest_examples_are_the_fewest(margin):
    n = least_examples(margin, 1.0)
    assert (1 - margin) ** n < 0.05 <= (1 - margin) ** (n - 1) * (1 + 1e-9)


def examples(n: int) -> list[Example]:
    return [Example(index, f"question {index}", "yes", ("yes",)) for index in range(n)]


def test_a_margin_that_nothing_can_decide_is_refused_beforehand():
    with pytest.raises(
        SettingsError, match=r"cannot be shown on the 50 different prompts of --confirm, .* Pass 149 or more"
    ):
        check_can_decide(Margin("accuracy", amount=0.02), examples(50))
    check_can_decide(Margin("accuracy", amount=0.02), examples(149))
    with pytest.raises(SettingsError, match="149 or more"):
        check_can_decide(Margin("accuracy", amount=0.02), examples(148))
    check_can_decide(Margin("accuracy", amount=0.07), examples(50))
    check_can_decide(Margin("loss", share=0.02), examples(5))
    with pytest.raises(SettingsError, match="1 prompt in --confirm"):
        check_can_decide(Margin("loss", share=0.02), examples(1))
    for margin, held_out in ((None, examples(5)), (Margin("accuracy", amount=0.001), [])):
        check_can_decide(margin, held_out)


def test_what_examples_can_typically_decide():
    """Of the gain in loss 2 % with 40 prompts, so 1 % with 160; a point of ROUGE-L with 1,500, of others 3,000."""

    def said(margin: str, n: int, n_held_out: int = 0) -> str | None:
        sets = {"validation": examples(n), "held-out": examples(n_held_out)}
        return what_can_be_decided(Margin.parse(margin), sets)

    enough = said("2%", 40, 160)
    assert enough is not None and "40 validation prompts about 2 %, 160 held-out prompts about 1 %" in enough
    assert "undecided" not in enough
    too_few = said("2%", 10, 160)
    assert too_few is not None and "10 validation prompts about 4 %" in too_few and "takes about 40." in too_few
    for margin, n in (("rougeL=1", 1500), ("accuracy=0.01", 3000), ("exact-match=1", 3000)):
        just, less = said(margin, n), said(margin, n // 4)
        assert just is not None and f"about {margin.partition('=')[2]} of" in just and "undecided" not in just
        assert less is not None and f"takes about {n:,}." in less
    assert said("loss=0.1", 100) is said("token-accuracy=0.1", 100) is None


def verdicts(*outcomes: str) -> dict[str, Verdict]:
    one = judge(loss_scores()[0], Margin("loss", share=0.02), range(80))
    return {
        f"{index} {outcome}": dataclasses.replace(one, outcome=outcome, lost=float(index))
        for index, outcome in enumerate(outcomes)
    }


@pytest.mark.parametrize(
    ("outcomes", "found", "n_asked"),
    [
        (["shown"] * 3, 2, 3),
        (["shown", "undecided", "shown"], 0, 2),
        (["refuted", "shown", "shown"], None, 1),
        (["shown", "shown", "refuted"], 1, 3),
        (["undecided"], None, 1),
    ],
)
def test_a_sequence_stops_at_the_first_that_is_not_shown(outcomes, found, n_asked):
    given_, asked = verdicts(*outcomes), []
    one, verdict = last_shown(list(given_), lambda name: asked.append(name) or given_[name])
    assert one == (None if found is None else list(given_)[found]) and len(asked) == n_asked
    assert verdict.lost == (found or 0)


def test_about_so_many_examples_are_needed_and_suffice():
    """Of as many as are said to be needed, four in five runs show it."""
    first = judge(loss_scores(seed=2, n=25, lost=0.012)[0], Margin("loss", share=0.02), range(25))
    assert first.outcome == "undecided" and first.n_needed is not None and first.n_needed > 25
    scores, _ = loss_scores(seed=3, n=5000, lost=0.012)  # a population
    truth = judge(scores, Margin("loss", share=0.02), range(5000), seed=0)
    spread = (truth.lost_at_most - truth.lost) / 1.95 * 5000**0.5
    n = int(((1.881 + 0.842) * spread / (truth.lost - truth.margin)) ** 2)
    runs = [
        judge(loss_scores(seed=10 + run, n=n, lost=0.012)[0], Margin("loss", share=0.02), range(n)) for run in range(30)
    ]
    assert np.mean([one.outcome == "shown" for one in runs]) == pytest.approx(0.8, abs=0.2)
    needed = [one.n_needed for one in runs if one.n_needed]
    assert all(one > n for one in needed)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6))
def test_the_order_of_examples_does_not_matter(seed):
    scores, _ = loss_scores(lost=0.01)
    order = np.random.default_rng(seed).permutation(80)
    shuffled = dataclasses.replace(scores, statistics=scores.statistics[:, order])
    one, other = (judge(each, Margin("loss", share=0.02), range(80)) for each in (scores, shuffled))
    assert other.lost == pytest.approx(one.lost) and other.lost_at_most == pytest.approx(one.lost_at_most, abs=2e-3)
