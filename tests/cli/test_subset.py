"""`lorazor score`, `subset` and `prune --scores` as a user types them."""

from __future__ import annotations

import json

import pytest


def test_score_prints_the_completeness_check_and_the_cost(lorazor, tiny, out):
    status, text, _ = lorazor("score", tiny.adapter, "--data", tiny.validation, "--points", 3, "--out", out)
    assert status == 0
    assert "Completeness: the credits add up to" in text and "standard error" in text
    assert "Cost: 3 forward-backward passes over 6 examples, for all 28 sites at once." in text
    assert "mlp.down_proj" in text


def test_score_with_checkpointing_gives_the_same(lorazor, tiny, tmp_path):
    scores = []
    for name, options in (("a", []), ("b", ["--gradient-checkpointing"])):
        place = ["--out", tmp_path / name]
        assert lorazor("score", tiny.adapter, "--data", tiny.validation, "--points", 2, *place, *options)[0] == 0
        lines = (tmp_path / name / "scores.jsonl").read_text().splitlines()
        scores.append([json.loads(line)["score"] for line in lines])
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)


def test_from_scores_to_a_smaller_adapter(lorazor, tiny, tmp_path):
    scores, small = tmp_path / "scores", tmp_path / "small"
    assert lorazor("score", tiny.adapter, "--method", "norm", "--out", scores)[0] == 0
    status, text, _ = lorazor("prune", tiny.adapter, "--scores", scores, "--keep", 7, "--by", "group", "--out", small)
    assert status == 0 and "of 28 sites" in text
    assert "lorazor-sites.svg" in (small / "README.md").read_text() and (small / "lorazor-sites.svg").exists()


def test_subset_prints_candidates_choice_and_verdict(lorazor, tiny, out):
    status, text, _ = lorazor(
        "subset", tiny.adapter, "--data", tiny.validation, "--confirm", tiny.held_out, "--params-fraction", 0.5,
        "--points", 1, "--baselines", "--out", out,
    )  # fmt: skip
    assert status == 0
    for expected in ("full", "random", "→", "what the budget holds", "held-out examples", "Adapter:"):
        assert expected in text
    card = (out / "adapter" / "README.md").read_text()
    assert "| | full adapter | this adapter | difference (95 % interval) |" in card


def test_subset_as_json(lorazor, tiny, out):
    arguments = ["--data", tiny.validation, "--keep", 3, "--method", "norm", "--out", out, "--json"]
    status, text, _ = lorazor("subset", tiny.adapter, *arguments)
    document = json.loads(text)
    assert status == 0 and document["chosen"]["n_sites"] == 3 and document["confirmation"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["subset", "{adapter}", "--data", "{data}"], "BudgetError: None given as the budget"),
        (["subset", "{adapter}", "--data", "{data}", "--params", "3"], "BudgetError"),
        (["subset", "{adapter}", "--data", "nowhere.jsonl", "--keep", "3"], "nowhere.jsonl"),
        (["subset", "nowhere", "--data", "{data}", "--keep", "3"], "AdapterError"),
        (["score", "{adapter}"], "SettingsError: method='credit' looks at examples"),
        (["prune", "{adapter}", "--scores", "nowhere", "--keep", "3"], "is not a run folder"),
        (["prune", "{adapter}", "--scores", "nowhere"], "BudgetError: No budget: how much is to stay? Pass --keep K"),
        (["prune", "{adapter}", "--tolerance", "loss", "--scores", "x"], "lorazor subset"),
    ],
)
def test_errors_are_one_line(lorazor, tiny, out, arguments, message):
    arguments = [part.format(adapter=tiny.adapter, data=tiny.validation) for part in arguments]
    status, text, messages = lorazor(*arguments, "--out", out)
    assert status == 1 and text == ""
    assert message in messages and len(messages.strip().splitlines()) == 1
    assert not out.exists()
