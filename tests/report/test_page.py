"""The page says what the runs say, needs nothing else, and is not for foreign text to change."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from lorazor.cli.report import print_headlines
from lorazor.report.drawing import DARK, LIGHT, resolved
from lorazor.report.figures import draw_boundary, draw_trade_off
from lorazor.report.headline import comparison, headline
from lorazor.report.page import draw_together, make_page, make_sections
from lorazor.report.reading import read_run, read_runs
from lorazor.report.sites import draw_maps
from tests.report import synthetic_runs

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\x1b[31m</script>{{ 7*7 }}"


class Parsed(HTMLParser):
    """Elements of a page by name, the texts of its scripts, and all its other text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self.is_script = False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.is_script = tag == "script"
        self.scripts += [""] if self.is_script else []

    def handle_endtag(self, tag):
        self.is_script = False

    def handle_data(self, data):
        if self.is_script:
            self.scripts[-1] += data
        else:
            self.text += data

    def n(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


def page_of(*paths: Path, n_examples: int = 50) -> Parsed:
    runs = read_runs(paths)
    return Parsed(make_page(make_sections(runs, n_examples), draw_together(runs)))


def poison(path: Path) -> None:
    """Put EVIL wherever a file of the run has a text of the user's."""
    for file in path.glob("*.json*"):
        text = file.read_text()
        for old in ("model.layers.0.self_attn.q_proj", "directions", "name[The", "Eagle", "The best", "test.jsonl"):
            text = text.replace(old, json.dumps(EVIL)[1:-1] + old)
        file.write_text(text)


def test_foreign_text_is_only_text(small, tmp_path):
    clean = page_of(small)
    poison(small)
    page = page_of(small)
    assert page.n("script") == clean.n("script") and page.n("img") == 0
    assert page.text.count("<script>alert(1)</script>") > 4, "it is shown as it is"
    assert "{{ 7*7 }}" in page.text and "\x1b" not in page.text
    figures = [json.loads(text) for text in page.scripts if text.startswith('{"data"')]
    assert len(figures) == 2
    assert not any("<script" in text for text in page.scripts if text.startswith('{"data"'))
    hover = figures[0]["data"][0]["customdata"][0][0]
    assert "&lt;script&gt;alert(1)" in hover, "plotly reads tags in its texts"


def test_foreign_text_does_nothing_to_a_terminal(small):
    poison(small)
    run = read_run(small, "evil \x1b[2J [bold]name")
    output = StringIO()
    print_headlines([run, run], Console(file=output, width=200, no_color=True))
    assert "\x1b" not in output.getvalue()
    assert "evil ␛[2J [bold]name" in output.getvalue()


def test_the_page_asks_the_network_for_nothing(small):
    page = page_of(small)
    policy = next(attrs["content"] for tag, attrs in page.elements if attrs.get("http-equiv"))
    assert policy is not None and policy.startswith("default-src 'none'")
    assert not [attrs for _, attrs in page.elements if "src" in attrs]
    links = [attrs["href"] for tag, attrs in page.elements if tag in ("a", "link")]
    assert links and all(link is not None and link.startswith("#") for link in links)


def test_the_command_that_started_the_run_is_on_the_page_if_one_did(tmp_path):
    path = synthetic_runs.write_run(tmp_path / "run", "train", {}, command_line="lorazor train --data 'my rows'")
    assert "lorazor train --data 'my rows'" in page_of(path).text
    synthetic_runs.write_run(path, "train", {}, command_line=None)
    assert "To repeat" not in page_of(path).text


def test_several_runs_of_every_kind_stay_under_six_megabytes(tmp_path):
    names = ("boundary", "shrink", "weights", "curves", "train", "eval")
    runs = read_runs([getattr(synthetic_runs, f"{name}_run")(tmp_path / name) for name in names])
    page = make_page(make_sections(runs, 200), draw_together(runs))
    assert len(page.encode()) < 6_000_000
    assert page.count("* plotly.js v") == 1


def test_the_headline_says_what_the_run_says(tmp_path):
    path = synthetic_runs.boundary_run(tmp_path / "run", n_layers=10, outcome="refuted")
    text = page_of(path).text
    outside, layer = 399000, sum(synthetic_runs.KINDS.values())
    kept, full = outside + 8 * layer, outside + 10 * layer
    assert f"{100 * (1 - kept / full):.1f} %" in text
    assert f"{kept:,} of {full:,} parameters" in text and "57 of 71 sites stay" in text
    assert "full adapter 1.3360" in text and "1.3410" in text and "worse by 0.0050" in text
    assert "✗ refuted" in text and "worse by less than 0.0020" in text and "at least 0.0030 worse (95 %)" in text
    assert "above the margin of 0.002: refuted." in text


def test_the_headline_of_a_shrink_has_ranks_bounds_and_verdict(tmp_path):
    path = synthetic_runs.shrink_run(tmp_path / "run", n_layers=10, outcome="undecided")
    run, text = read_run(path, "run"), page_of(path).text
    per_rank = {kind: size // synthetic_runs.RANK for kind, size in synthetic_runs.KINDS.items()}
    assert run.choice is not None
    kept = sum(per_rank.get(site.kind, 399000 // 8) * site.ranks[0] for site in run.kept if site.ranks)
    assert f"{kept:,} of {399000 + 10 * 8 * sum(per_rank.values()):,} parameters" in text
    ranks = [site.ranks[0] for site in run.kept if site.ranks]
    assert f"{len(ranks)} of 71 sites stay, at rank {min(ranks)} to {max(ranks)} of 8" in text
    assert f"at most {run.choice.chosen.lost_at_most:.4f} worse (95 %)" in text
    assert "undecided" in text and "about 1,234 prompts would decide" in text
    assert "✓" not in text and "✗" not in text
    assert "By direction, ranked by credit in the balanced basis, with 4 passes over each example." in text
    assert "The credits add up to 1.21; the adapter gains 1.21 in loss" in text


def change_choice(path: Path, **changes: object) -> Path:
    document = json.loads((path / "shrink.json").read_text())
    (path / "shrink.json").write_text(json.dumps(document | changes))
    return path


def test_without_a_verdict_it_says_why(tmp_path):
    path = change_choice(synthetic_runs.shrink_run(tmp_path / "run", 3, 4), verdict=None)

    def said() -> str:
        return " ".join(headline(read_run(path, "run")).sentences)

    assert "No verdict: it was chosen on these examples" in said()
    change_choice(path, margin=None)
    assert "No verdict: a size was asked for" in said()
    change_choice(path, chosen="full", reason="Nothing is dropped: so it is.")
    assert "No verdict" not in said() and said().count("Nothing is dropped") == 1


def test_a_verdict_on_what_was_not_kept_says_so(tmp_path):
    path = change_choice(synthetic_runs.shrink_run(tmp_path / "run", 3, 4, outcome="refuted"), chosen="full")
    text = page_of(path).text
    assert "of a smaller adapter, which was not kept" in text and "✗ refuted" in text
    row = comparison(read_runs([path]))[0]
    assert row[5:] == ("1.3360", "–", "–", "✗ refuted (a smaller one)")


def test_the_comparison_has_what_is_lost_whatever_the_metric(tmp_path):
    shrink, evaluation = (getattr(synthetic_runs, f"{name}_run")(tmp_path / name) for name in ("shrink", "eval"))
    rows = {(row[0], row[4]): row[5:] for row in comparison(read_runs([shrink, evaluation]))}
    assert rows["shrink", "loss"] == ("1.3470", "1.3520", "+0.0050 (+0.0030 to +0.0070)", "✓ shown")
    assert rows["eval: small", "loss"][2] == "+0.0160 (−0.0036 to +0.0356)"
    assert rows["eval: small", "rougeL"][2] == "+0.60 (+0.58 to +0.62)", "61.9 is worse than 62.5"


def test_what_a_run_does_not_have_is_said_in_words(tmp_path):
    text = page_of(synthetic_runs.weights_run(tmp_path / "run")).text
    missing = text[text.index("What this run does not have") :]
    assert "lorazor boundary" in missing and "lorazor curves" in missing and "lorazor eval" in missing
    assert "Scores of the sites" not in missing
    assert "The weights alone decided, and nothing was measured." in text and "not measured" in text


def test_examples_are_limited_and_worst_first(small):
    text = page_of(small, n_examples=2).text
    assert "2 of 4 examples" in text
    shown = [int(index) for index in re.findall(r"example (\d+)\b", text)]
    run = read_run(small, "run")
    assert shown == [one.index for one in run.examples[:2]]


def test_several_runs_come_side_by_side_first(tmp_path):
    paths = [synthetic_runs.shrink_run(tmp_path / name, 3, 4, seed) for seed, name in enumerate("ab")]
    page = page_of(*paths, synthetic_runs.boundary_run(tmp_path / "c", 3, 4))
    assert page.text.index("3 runs side by side") < page.text.index("What was kept")
    assert {"#run-1", "#run-2", "#run-3"} <= {attrs.get("href") for _, attrs in page.elements}
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("name", ["boundary", "shrink", "weights", "evaluation"])
def test_real_runs_make_pages(name, real):
    expected = {"boundary": "held-out examples", "shrink": "worse by less than 0.5000", "weights": "at rank 2 of 4"}
    expected |= {"evaluation": "Adapters on the same examples"}
    assert expected[name] in page_of(getattr(real, name)).text


@pytest.mark.slow
def test_a_real_choice_of_sites_makes_a_page(training):
    assert "5 of 28" in page_of(training).text


# Figures


def test_the_map_has_every_score_in_its_place(small):
    run = read_run(small, "run")
    (drawing,) = draw_maps(run)
    (trace,) = drawing.figure.data
    assert list(trace.x) == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    kinds = list(synthetic_runs.KINDS)
    for site in run.sites:
        if site.layer is not None:
            row, column = site.layer, kinds.index(site.kind)
            assert trace.z[row][column] == site.score
            assert site.ranks is not None
            assert trace.text[row][column] == (str(site.ranks[0]) if site.keep else "×")
            assert site.name in trace.customdata[row][column]
    assert list(trace.y) == [0, 1, 2] and drawing.figure.layout.yaxis.autorange != "reversed", "layer 0 at the bottom"


def test_an_encoder_decoder_has_a_map_for_each_stack_and_gaps_where_there_is_no_lora(tmp_path):
    path = synthetic_runs.weights_run(tmp_path / "run", n_layers=2)
    (path / "selection.json").unlink()
    rows = [json.loads(line) for line in (path / "scores.jsonl").read_text().splitlines()]
    more = [{**row, "site": "d" + row["site"], "stack": "decoder"} for row in rows[:-3] if row["stack"]]
    synthetic_runs.write_rows(path / "scores.jsonl", rows + more)
    first, second = draw_maps(read_run(path, "run"))
    assert ("model.layers" in first.title, "decoder" in second.title) == (True, True)
    assert sum(value is None for row in second.figure.data[0].z for value in row) == 2
    assert "No colour: no LoRA there." in second.caption and "No colour" not in first.caption


def test_the_boundary_has_its_band_and_its_choice(tmp_path):
    run = read_run(synthetic_runs.boundary_run(tmp_path / "run", n_layers=10), "run")
    drawing = draw_boundary(run)
    assert drawing is not None and run.choice is not None
    band, line, ring = drawing.figure.data[:3]
    assert run.choice.boundary is not None
    points = run.choice.boundary.candidates
    assert list(line.y) == [point.value for point in points]
    errors = [point.difference.standard_error for point in points]
    upper = [y + error for y, error in zip(line.y, errors, strict=True)]
    assert list(band.y[:11]) == pytest.approx(upper)
    assert (list(ring.x), list(ring.y)) == ([8], [run.choice.chosen.value])


def test_whole_sites_have_no_ranks_on_the_map(tmp_path):
    (drawing,) = draw_maps(read_run(synthetic_runs.boundary_run(tmp_path / "run", n_layers=5), "run"))
    assert {text for row in drawing.figure.data[0].text for text in row} == {"", "×"}
    assert "Numbers are the ranks" not in drawing.caption


def test_the_candidates_have_their_bounds_and_the_margin(tmp_path):
    path = synthetic_runs.shrink_run(tmp_path / "run", 3, 4)
    document = json.loads((path / "shrink.json").read_text())
    drawing = draw_trade_off([read_run(path, "run")], "loss")
    assert drawing is not None
    line, ring, margin = drawing.figure.data
    by_size = sorted(document["candidates"], key=lambda one: one["n_parameters"])
    assert list(line.x) == pytest.approx([100 * one["n_parameters"] / document["n_parameters"] for one in by_size])
    assert list(line.y) == [one["value"] for one in by_size]
    ends = [y + up for y, up in zip(line.y, line.error_y.array, strict=True)]
    assert ends[:-1] == pytest.approx([1.336 + one["lost_at_most"] for one in by_size[:-1]])
    assert set(line.error_y.arrayminus) == {0} and line.error_y.array[-1] == 0, "the full adapter loses nothing"
    assert list(margin.y) == pytest.approx([1.336 + 0.0243] * 2)
    chosen = next(one for one in by_size if one["label"] == document["chosen"])
    assert list(ring.y) == [chosen["value"]]
    assert drawing.figure.layout.xaxis.type == "log"


def test_healed_candidates_stand_apart_from_the_line(tmp_path):
    path = synthetic_runs.shrink_run(tmp_path / "run", 3, 4)
    candidates = json.loads((path / "shrink.json").read_text())["candidates"]
    healed = {**candidates[-1], "label": f"{candidates[-1]['label']}, healed", "value": 1.34, "is_healed": True}
    change_choice(path, candidates=[*candidates, healed], chosen=healed["label"])
    run = read_run(path, "run")
    drawing = draw_trade_off([run], "loss")
    assert drawing is not None and run.choice is not None
    line, apart, ring, _ = drawing.figure.data
    assert len(line.x) == len(candidates) and apart.name == "candidates, healed" and apart.mode == "markers"
    assert (list(apart.x), list(apart.y)) == (list(ring.x), list(ring.y)) == ([line.x[0]], [1.34])
    assert run.choice.chosen.is_healed


def test_where_higher_is_better_margin_and_bounds_are_below(tmp_path):
    path = synthetic_runs.shrink_run(tmp_path / "run", 3, 4)
    candidates = json.loads((path / "shrink.json").read_text())["candidates"]
    for one in candidates:
        one["value"] = 1.336 - (one["lost"] or 0)
    change_choice(path, metric="rougeL", higher_is_better=True, candidates=candidates, verdict=None)
    drawing = draw_trade_off([read_run(path, "run")], "rougeL")
    assert drawing is not None
    line, _, margin = drawing.figure.data
    assert list(margin.y) == pytest.approx([1.336 - 0.0243] * 2) and set(line.error_y.array) == {0}
    assert line.error_y.arrayminus[0] == pytest.approx(0.004)


def test_the_trade_off_has_all_runs_and_one_margin(tmp_path):
    paths = [synthetic_runs.shrink_run(tmp_path / name, 3, 4) for name in "ac"]
    paths.append(synthetic_runs.boundary_run(tmp_path / "b", 3, 4))
    runs = read_runs(paths)
    drawing = draw_trade_off(runs, "loss")
    assert drawing is not None
    names = sorted(trace.name for trace in drawing.figure.data)
    assert names == ["a", "b", "c", "chosen", "chosen", "chosen", "margin"]
    boundary = next(trace for trace in drawing.figure.data if trace.name == "b")
    outside, layer = 399000, sum(synthetic_runs.KINDS.values())
    assert list(boundary.x) == pytest.approx([100 * (outside + b * layer) / (outside + 3 * layer) for b in range(4)])
    assert draw_trade_off(runs, "bleu") is None


def test_both_themes_name_the_same_colours(small):
    assert set(LIGHT) == set(DARK)
    (drawing,) = draw_maps(read_run(small, "run"))
    assert "var(--" in drawing.figure.to_json()
    assert "var(--" not in resolved(drawing.figure.to_json())


def luminance(colour: str) -> float:
    """Relative luminance, as the Web Content Accessibility Guidelines define it."""
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * channel for weight, channel in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize("name", ["ink", "muted", "first", "second", "third", "fourth", "fifth", "good", "bad"])
def test_text_and_lines_stand_out(theme, name):
    for ground in ("ground", "panel"):
        high, low = sorted((luminance(theme[name]), luminance(theme[ground])), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5, "level AA"
