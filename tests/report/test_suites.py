"""Leaderboards and answers are what numpy and scipy make of the rows, within seeds; and nothing is claimed of few."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from lorazor.errors import DataError, OutputError, SettingsError
from lorazor.report.findings import findings
from lorazor.report.gains import draw_gains
from lorazor.report.leaderboards import board_table, compact_table, leaderboards, reading_aid
from lorazor.report.page import make_page
from lorazor.report.suite_page import make_suite_section, suite_markdown
from lorazor.report.suites import SuiteResults, read_suite_results
from tests.report.made_up_suites import grid, write_suite
from tests.report.test_page import EVIL, Parsed

METHODS = [("base", [None]), ("lora", [None]), ("low-rank", [0.125]), ("weightlora", [0.125, 0.05])]


def noisy(task: str, method: str, budget: float | None, seed: int) -> float:
    """Seeds differ by far more than methods do, so that only pairs show anything."""
    level = {"base": 0.9, "lora": 0.2, "low-rank": 0.3, "weightlora": 0.25}[method] + (0.04 if budget == 0.05 else 0)
    own = np.random.default_rng(zlib.crc32(f"{task}{method}{budget}{seed}".encode())).normal(0, 0.003)
    return level * (1 + 0.2 * seed) + 0.1 * seed + own


@pytest.fixture
def noisy_rows():
    rows = grid(["sst2"], METHODS, [0, 1, 2, 3], noisy)
    return [row for row in rows if (row["method"], row["seed"]) != ("low-rank", 3)]  # not every pair is there


def values(rows, method, budget, metric):
    share = budget and {"kind": "params", "share": budget}
    mine = [row for row in rows if row["method"] == method and row["budget"] == share]
    return {row["seed"]: row["metrics"][metric] for row in mine}


def results(rows) -> SuiteResults:
    return SuiteResults(Path("out"), "tiny", tuple(rows))


def test_a_line_is_what_numpy_and_scipy_say(noisy_rows):
    board = next(one for one in leaderboards(results(noisy_rows)) if one.budget == "params=0.125")
    assert board.against == "low-rank" and board.metrics == ("accuracy", "loss")
    line = next(one for one in board.lines if one.method == "weightlora")
    own, other, base, lora = (
        values(noisy_rows, method, budget, "loss")
        for method, budget in (("weightlora", 0.125), ("low-rank", 0.125), ("base", None), ("lora", None))
    )
    loss = np.array(list(own.values()))
    assert (line.metrics["loss"].mean, line.metrics["loss"].error) == pytest.approx((loss.mean(), stats.sem(loss)))
    paired = np.array([own[seed] - other[seed] for seed in (0, 1, 2)])
    found = line.differences["loss"]
    assert (found.spread.mean, found.spread.error, found.spread.n) == pytest.approx(
        (paired.mean(), stats.sem(paired), 3)
    )
    assert abs(paired.mean()) > 2 * stats.sem(paired) and found.verdict == "better"
    unpaired = np.hypot(stats.sem(loss), stats.sem(list(other.values())))
    assert abs(paired.mean()) < 2 * unpaired, "the seeds would hide it"
    gain = np.array([100 * (base[seed] - own[seed]) / (base[seed] - lora[seed]) for seed in own])
    assert (line.gains["loss"].mean, line.gains["loss"].error) == pytest.approx((gain.mean(), stats.sem(gain)))
    assert line.seconds.mean == 11.5 and line.n_seeds == 4
    noisy_rows[-1]["peak_bytes"] = 3e9  # weightlora's, of one seed in four
    assert next(
        one for board in leaderboards(results(noisy_rows)) for one in board.lines
        if (board.budget, one.method) == ("params=0.05", "weightlora")
    ).peak_bytes == 1.5e9  # fmt: skip


def test_the_figure_names_every_method_beside_its_points(noisy_rows):
    figure = draw_gains(results(noisy_rows))[0].figure
    at = {(trace.name, y): x for trace in figure.data for x, y in zip(trace.x, trace.y, strict=True)}
    assert at.keys() == {
        ("params=0.125", "low-rank"), ("params=0.125", "weightlora"), ("params=0.05", "weightlora"),
        ("no budget", "lora"),
    }  # fmt: skip
    assert at["no budget", "lora"] == 100 > at["params=0.125", "weightlora"] > at["params=0.125", "low-rank"]
    few = draw_gains(results([row for row in noisy_rows if row["seed"] < 2]))[0].figure
    for drawn, looks in (
        (figure, {"circle", "square", "diamond"}),
        (few, {"circle-open", "square-open", "diamond-open"}),
    ):
        assert {symbol for trace in drawn.data for symbol in trace.marker.symbol} == looks
    assert figure.layout.yaxis.tickvals == ("low-rank", "weightlora", "lora"), "the best is on top"
    assert figure.layout.yaxis.ticktext == ("low-rank", "weightlora", "lora, 80,000")


def test_the_best_is_first_and_methods_without_a_budget_are_on_every_board(noisy_rows):
    boards = leaderboards(results(noisy_rows))
    assert [(one.budget, one.against) for one in boards] == [("params=0.125", "low-rank"), ("params=0.05", "lora")]
    assert [line.method for line in boards[0].lines] == ["lora", "low-rank", "weightlora", "base"]
    assert "A method with fewer seeds" in reading_aid(boards), "low-rank lacks the worst"
    assert [line.n_parameters for line in boards[1].lines] == [80_000, 4_000, 0]
    assert leaderboards(results(noisy_rows), "base")[0].lines[0].differences["accuracy"].verdict == "better"
    with pytest.raises(SettingsError, match="against='dora' has no rows. Pass one of base, lora"):
        leaderboards(results(noisy_rows), "dora")


def test_two_seeds_claim_nothing():
    rows = results(grid(["sst2", "rte"], METHODS, [0, 1], noisy))
    lines = [line for board in leaderboards(rows) for line in board.lines]
    assert {one.verdict for line in lines for one in line.differences.values()} == {"few seeds"}
    told = " ".join(sentence for one in findings(rows) for sentence in one.sentences)
    assert (
        "better by" not in told and "nothing is claimed" in told and "by chance" not in reading_aid(leaderboards(rows))
    )


def test_no_share_of_a_gain_that_lora_does_not_have():
    def loss(task, method, budget, seed):
        return 1.5 if (task, method, seed) == ("rte", "lora", 1) else noisy(task, method, budget, seed)

    rows = results(grid(["sst2", "rte"], METHODS, [0, 1, 2], loss))
    assert rows.gain("rte", "params=0.125", "weightlora", "loss") is None
    assert rows.gain("sst2", "params=0.125", "weightlora", "loss") is not None
    assert [one.key for one in draw_gains(rows)] == ["results-sst2-loss", "results-sst2-accuracy"]
    assert told(rows, "cutting").endswith("Not counted: rte, where lora does not lower the loss of base on every seed.")


def test_chance_on_a_task_where_nothing_is_learned_is_not_counted():
    def loss(task, method, budget, seed):
        if task == "rte":  # weightlora is above low-rank on every seed, by less than lora's own chance
            return 0.69 + 0.001 * (method == "weightlora") + 0.002 * (method == "lora")
        return noisy(task, method, budget, seed)

    tasks = [results(grid(names, METHODS, [0, 1, 2], loss)) for names in (["sst2"], ["sst2", "rte"])]
    alone, both = (told(rows, "choosing") for rows in tasks)
    assert both.replace(" Not counted: rte, where lora does not lower the loss of base on every seed.", "") == alone
    assert len(leaderboards(tasks[1])) > len(leaderboards(tasks[0])), "its tables stay"


def test_a_number_that_is_missing_is_no_number():
    rows = grid(["sst2"], METHODS, [0, 1, 2], noisy)
    next(row for row in rows if row["method"] == "low-rank")["metrics"]["accuracy"] = None  # NaN, in JSON
    board = leaderboards(results(rows), "lora")[0]
    assert board.lines[-1].method == "low-rank", "it is not ranked by the seeds that went well"
    assert board_table(board).rows[-1][4] == "–" and board.lines[-1].differences["accuracy"].verdict == "open"


TWO_PAPERS = [
    ("base", [None]), ("lora", [None]), ("boundary", [None]), ("first-sites", [0.125]), ("last-sites", [0.125]),
    ("random-sites", [0.125]), ("weightlora", [0.125]), ("fisher", [0.125, 0.05]),
]  # fmt: skip


def planted(task: str, method: str, budget: float | None, seed: int) -> float:
    """The last layers matter on rte alone; weightlora beats chance on sst2 alone; fisher keeps 99 %, and 80 %."""
    gains = {"base": 0.0, "lora": 1.0, "boundary": 1.0, "random-sites": 0.5, "weightlora": 0.5, "fisher": 0.99}
    gains |= {"first-sites": 0.7, "last-sites": 0.4} if task == "sst2" else {"first-sites": 0.4, "last-sites": 0.7}
    gains |= {"weightlora": 0.6} if task == "sst2" else {}
    gains |= {"fisher": 0.8} if budget == 0.05 else {}
    noise = 0 if method in ("base", "lora") else 0.001 * np.sin(7 * seed + len(method))
    return 1 - 0.5 * (gains[method] + noise)


def told(rows: SuiteResults, key: str) -> str:
    return " ".join(next(one for one in findings(rows) if one.key == key).sentences)


def test_answers_are_counted_from_the_rows():
    rows = results(grid(["sst2", "rte"], TWO_PAPERS, [0, 1, 2], planted))
    assert "not all fill it" not in told(rows, "papers")
    for row in rows.rows:
        row["n_parameters"] -= 2_000 * (row["method"] == "last-sites")  # pyright: ignore[reportIndexIssue]
    assert (
        "first-sites against last-sites: in the task's metric better by more than two standard errors on 1 of 2 "
        "(sst2 at params=0.125), worse on 1 (rte at params=0.125), open on 0; in loss better on 1 of 2"
    ) in told(rows, "papers")
    assert "It depends on where: the first layers are worth more on 1, the last layers on 1," in told(rows, "papers")
    assert (
        "Against random-sites, in loss: better by more than two standard errors on 3 of 4, worse on 0, open on 1. "
        "3 of the 3 better ones have at most 5 % more parameters than what they beat. By method, better somewhere, "
        "nowhere shown worse: weightlora, fisher."
    ) in told(rows, "choosing")
    assert (
        "params=0.125 is a limit, and not all fill it: mean over tasks from 10.0 % of lora's parameters (last-sites) "
        "to 12.5 % (first-sites, random-sites, weightlora)."
    ) in told(rows, "papers")
    assert "Above" not in told(rows, "papers")
    for row in rows.rows:
        row["n_parameters"] += 4_000 * (row["method"] == "weightlora")  # pyright: ignore[reportIndexIssue]
    assert "(weightlora). Above params=0.125 on a task, since they count in sites or ranks: weightlora." in told(
        rows, "papers"
    )
    assert "2 of the 3 better ones have at most 5 %" in told(rows, "choosing"), "weightlora has more"
    for row in rows.rows:
        row["n_parameters"] -= 4_000 * (row["method"] == "weightlora")  # pyright: ignore[reportIndexIssue]
    assert (
        "boundary on rte keeps 75.0 % of lora's parameters and 100.1 ± 0.0 % of its gain in loss; it drops nothing in "
        "0 of 3 trainings."
    ) in told(rows, "boundary")
    assert "at least 98 % of lora's in 2 of 2 cases: fisher on sst2 (99.0 ± " in told(rows, "cutting")
    assert "At params=0.05, the mean gain in loss is at least 98 % of lora's in 0 of 2 cases." in told(rows, "cutting")
    assert "at least 98 % is shown in 2, below it in 2, open in 0." in told(rows, "cutting"), "a spread of 0.1 points"


def test_answers_turn_around_with_the_rows():
    def turned(task: str, method: str, budget: float | None, seed: int) -> float:
        return 9.0 if method == "base" else -planted(task, method, budget, seed)

    rows = results(grid(["sst2", "rte"], TWO_PAPERS, [0, 1, 2], turned))
    assert "better by more than two standard errors on 1 of 2 (rte at params=0.125), worse on 1 (sst2" in told(
        rows, "papers"
    )
    assert "better by more than two standard errors on 0 of 4, worse on 3" in told(rows, "choosing")
    idle = results(grid(["sst2", "rte"], TWO_PAPERS, [0, 1, 2], lambda *cell: -planted(*cell)))
    assert "Not counted: sst2, rte, where lora does not lower the loss" in told(idle, "cutting")


def test_what_is_missing_is_said():
    rows = grid(["sst2", "rte"], TWO_PAPERS, [0, 1, 2], planted)
    some = results(row for row in rows if (row["task"], row["method"]) != ("rte", "boundary"))
    assert told(some, "boundary").endswith("No rows of boundary-best, low-rank, shrink on any task; boundary on rte.")
    none = results(row for row in rows if row["method"] in ("base", "lora"))
    assert told(none, "papers").startswith(
        "No rows that answer this, or none of seeds in common. No rows of first-sites, last-sites"
    )


def test_a_folder_is_read_and_what_is_wrong_with_it_is_said(tmp_path):
    rows = grid(["sst2"], METHODS, [0], noisy)
    failures = [
        {"cell": rows[0]["cell"], "name": "finished since", "error": "x"},
        {"cell": "z", "name": "sst2, low-rank, params=0.05, seed=0", "error": "an earlier try"},
        {"cell": "z", "name": "sst2, low-rank, params=0.05, seed=0", "error": "Traceback\nBudgetError: too little.\n"},
    ]
    found = read_suite_results(write_suite(tmp_path / "a", rows, failures))
    assert found.name == "tiny" and len(found.rows) == 5
    assert found.failures == (("sst2, low-rank, params=0.05, seed=0", "BudgetError: too little."),)
    with pytest.raises(DataError, match="line 6 is of the same cell as line 1"):
        read_suite_results(write_suite(tmp_path / "b", [*rows, rows[0]]))
    with pytest.raises(OutputError, match="line 1 is damaged: KeyError.'seconds'"):
        read_suite_results(write_suite(tmp_path / "c", [{key: rows[0][key] for key in rows[0] if key != "seconds"}]))
    with pytest.raises(OutputError, match="other.*this lorazor reads 'lorazor.results/1'.*begin a new folder"):
        read_suite_results(write_suite(tmp_path / "d", [rows[0] | {"schema": "other"}]))
    with pytest.raises(OutputError, match="no cell has finished: sst2, low-rank, params=0.05, seed=0: an earlier try"):
        read_suite_results(write_suite(tmp_path / "e", [], failures[:2]))


def test_foreign_text_is_only_text_and_everything_is_on_the_page(tmp_path):
    rows = [row | {"task": EVIL + row["task"]} for row in grid(["sst2"], METHODS, [0, 1, 2], noisy)]
    failures = [{"cell": "z", "name": EVIL, "error": f"{EVIL}\n{EVIL}|"}]
    section = make_suite_section(read_suite_results(write_suite(tmp_path / "suite", rows, failures)))
    page = Parsed(make_page([], suite=section))
    assert page.n("img") == 0 and page.n("script") == 4 and "\x1b" not in page.text
    assert page.text.count("<script>alert(1)</script>") > 4, "it is shown as it is"
    for board in section.tables:
        assert all(cell in page.text for row in board.rows for cell in row)
    markdown = suite_markdown(section, tmp_path / "results.md", {section.drawings[0].key: tmp_path / "i" / "a.png"})
    assert "<script" not in markdown and "&lt;script>" in markdown and "](i/a.png)" in markdown
    header = next(line for line in markdown.splitlines() if line.startswith("| method | seeds"))
    lines = markdown.split(header)[1].splitlines()[2:6]
    assert [line.split(" | ")[0] for line in lines] == ["| lora", "| weightlora", "| low-rank", "| base"]


def test_the_terminal_needs_120_columns(capsys, monkeypatch):
    from lorazor.cli.report import print_boards

    monkeypatch.setenv("COLUMNS", "120")
    long = [("weightlora-every-step" if name == "weightlora" else name, budgets) for name, budgets in METHODS]
    rows = results(grid(["sst2"], long, [0, 1, 2], lambda task, method, *rest: noisy(task, method[:10], *rest)))
    boards = leaderboards(rows)
    print_boards(boards)
    lines = capsys.readouterr().out.splitlines()[:-1]  # the last says how to read them
    assert max(map(len, lines)) <= 120
    assert all(" ".join(row[:3]) in " ".join(" ".join(lines).split()) for row in compact_table(boards[0]).rows)


def sized(rows, method: str, sizes: dict[int, int]):
    for row in rows:
        row["n_parameters"] = sizes.get(row["seed"], row["n_parameters"]) if row["method"] == method else 8_000
    return rows


def test_sizes_are_compared_on_the_seeds_that_the_difference_is_of():
    rows = grid(["sst2"], TWO_PAPERS, range(6), planted)
    rows = [row for row in rows if row["method"] != "weightlora" or row["seed"] < 3]
    smaller_there = sized(rows, "random-sites", {0: 7_000, 1: 7_000, 2: 7_000, 3: 99_000, 4: 99_000, 5: 99_000})
    assert "1 of the 2 better ones" in told(results(smaller_there), "choosing"), "fisher on six seeds, not weightlora"
    without = [row for row in sized(rows, "", {}) if row["method"] not in ("lora", "fisher")]
    assert "1 of the 1 better ones have at most 5 %" in told(results(without), "choosing"), "lora has no part in it"


def test_a_budget_that_is_filled_exactly_is_met():
    methods = [("lora", [None]), ("random-sites", [1 / 64]), ("weightlora", [1 / 64])]
    rows = grid(["sst2"], methods, [0, 1, 2], lambda *cell: 0.5)
    assert "Above" not in told(results(rows), "papers")
    for row in rows[1:]:
        row["n_parameters"] = 2_000 if row["budget"] else row["n_parameters"]
    assert "Above params=0.015625 on a task, since they count in sites or ranks: random-sites, weightlora." in told(
        results(rows), "papers"
    )


def test_a_figure_of_any_names_and_gains_shows_its_points():
    methods = [
        ("base", [None]),
        ("lora", [None]),
        ("1", [0.125]),
        ("100", [0.125]),
        ("far", [0.125]),
        ("x" * 90, [0.125]),
    ]
    gains = {"base": 0.0, "lora": 1.0, "1": 0.5, "100": 0.7, "far": 20.0, "x" * 90: 0.9}

    def loss(task, method, budget, seed):
        return np.nan if (method, seed) == ("100", 1) else 1 - 0.5 * gains[method]

    drawings = draw_gains(results(grid(["a b", "a/b"], methods, [0, 1, 2], loss)))
    assert len({one.key for one in drawings}) == 4
    axis, points = drawings[0].figure.layout.yaxis, [y for trace in drawings[0].figure.data for y in trace.y]
    assert axis.type == "category" and sorted(points) == ["1", "lora", "x" * 90], "NaN has no place"
    assert axis.tickvals[-1] == "far" and len(axis.ticktext[1]) == 40
    assert drawings[0].figure.layout.xaxis.range == (47, 103)
    assert "Too far off to be drawn: far (params=0.125, 2000.0 ± 0.0 %)." in drawings[0].caption


@pytest.mark.parametrize(
    "change",
    [
        {"metrics": {}}, {"metrics": {"loss": "x"}}, {"seconds": None}, {"n_parameters": None}, {"budget": {}},
        {"budget": {"kind": "params", "share": "1/2"}}, {"seed": [0]}, {"task": 3}, {"versions": [1]},
        {"n_parameters": 10**400}, {"ranks": None}, {"cell": [1]}, {"n_text": None},
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_row_is_named(change, tmp_path):
    rows = grid(["sst2"], METHODS, [0], noisy)
    with pytest.raises(OutputError, match=r"results.jsonl, line 3 is damaged: .*its cell is then run again"):
        read_suite_results(write_suite(tmp_path / "a", [*rows[:2], rows[2] | change]))


def test_lines_end_where_json_lines_do(tmp_path):
    rows = [row | {"task": "a\u2028b\u0085c"} for row in grid(["sst2"], METHODS, [0], noisy)]
    failures = [{"cell": "z", "name": "z", "error": None}]
    path = write_suite(tmp_path / "a", rows, failures)
    assert len(read_suite_results(path).rows) == 5 and read_suite_results(path).failures == (("z", "None"),)
    (path / "results.jsonl").write_bytes(b"\xff\n")
    with pytest.raises(OutputError, match="line 1: not JSON"):
        read_suite_results(path)
