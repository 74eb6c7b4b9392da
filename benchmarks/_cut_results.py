"""Rows that `how_small.py` measured: as a table, and as the figure of README."""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorazor.measure.metrics import teacher_forced_scores
from lorazor.select.verdict import Margin, judge

METHODS = (
    "energy", "energy per size", "one rank", "convert_to_lora", "surgery", "plain credit", "balanced", "fisher",
    "credit", "balanced one rank", "boundary",
)  # fmt: skip
FULL, BASE, DIRECT = "full", "base", "direct"
MARGIN = "2%"
Row = dict[str, Any]


def report(arguments: argparse.Namespace) -> None:
    """What every method loses by task and source rank, in per cent of the gain, and how small it gets at the margin."""
    groups, ends = _grouped(arguments.results)
    columns = ("task", "rank", "share", "method", "adapters", "parameters", "loss", "healed", "lost", "lost, healed",
               f"shown at {MARGIN}", "shown, healed")  # fmt: skip
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    order = {FULL: -1, BASE: -2, DIRECT: 99} | {method: index for index, method in enumerate(METHODS)}
    for key in sorted(groups, key=lambda one: (one[0], one[1], -one[2], order[one[3]])):
        own = groups[key]
        size = statistics.mean(row["n_parameters"] for row in own)
        cells = [_with_error([mean_loss(row[name]) for row in own if name in row]) for name in ("loss", "healed")]
        found = [_against(ends[key[0], row["adapter"]], row) for row in own]
        for name in ("loss", "healed"):
            cells.append(_with_error([100 * one[name][0] for one in found if name in one], 1))
        for name in ("loss", "healed"):
            outcomes = [one[name][1] for one in found if name in one]
            cells.append(f"{outcomes.count('shown')} of {len(outcomes)}" if outcomes else "")
        print(f"| {key[0]} | {key[1]} | {key[2]:.1%} | {key[3]} | {len(own)} | {size:,.0f} | {' | '.join(cells)} |")
    print(
        f"\nPer cent of the parameters at which {MARGIN} of the gain are lost, between the sizes that were measured:\n"
    )
    print("| task | rank | method | adapters | unhealed | healed |\n|---|---|---|---|---|---|")
    families = {(key[0], key[1], key[3]) for key in groups if key[3] in METHODS}
    for task, rank, method in sorted(families, key=lambda one: (*one[:2], order[one[2]])):
        adapters = {row["adapter"] for key, own in groups.items() if key[:2] == (task, rank) for row in own}
        sizes = {}
        for name in ("loss", "healed"):
            lost = [_lost_by_share(groups, ends, task, rank, method, adapter, name) for adapter in adapters]
            sizes[name] = [_size_at_margin(one) for one in lost if len(one) > 1]
        if any(sizes.values()):
            cells = [_sizes(own) for own in sizes.values()]
            print(f"| {task} | {rank} | {method} | {max(map(len, sizes.values()))} | {' | '.join(cells)} |")


def _lost_by_share(
    groups: dict[tuple, list[Row]], ends: dict[tuple, dict[str, Row]],
    task: str, rank: int, method: str, adapter: str, name: str,
) -> list[tuple[float, float]]:  # fmt: skip
    """Share of the parameters, from small to large, and per cent of the gain that is lost, of one adapter."""
    found = []
    for (*family, share, own_method), rows in groups.items():
        for row in rows:
            if (*family, own_method, row["adapter"]) == (task, rank, method, adapter):
                against = _against(ends[task, adapter], row)
                found += [(share, 100 * against[name][0])] if name in against else []
    return sorted(found)


def _size_at_margin(lost: list[tuple[float, float]]) -> float:
    """Per cent of the parameters at which the margin is lost, linear in the logarithm of the size; inf, 0 outside."""
    margin = Margin.parse(MARGIN).share
    assert margin is not None
    for (small, more), (large, less) in zip(lost[:-1], lost[1:], strict=True):
        if less <= 100 * margin < more:
            weight = (more - 100 * margin) / (more - less)
            return 100 * math.exp((1 - weight) * math.log(small) + weight * math.log(large))
    return 0.0 if lost[0][1] <= 100 * margin else math.inf


def _sizes(sizes: list[float]) -> str:
    """Their mean, and how many lie outside of what was measured."""
    inside = [one for one in sizes if 0 < one < math.inf]
    beside = [(sizes.count(0.0), "smaller"), (sizes.count(math.inf), "larger")]
    return ", ".join([_with_error(inside, 1)] * bool(inside) + [f"{n} {which}" for n, which in beside if n])


def figure(arguments: argparse.Namespace) -> None:
    """What stays of the gain against the bytes of the file, a panel for each task and source rank: README's figure."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    groups, ends = _grouped(arguments.results)
    panels = sorted({(task, rank) for task, rank, _, method in groups if method == "fisher"})
    titles = [f"{arguments.titles.get(task, task)}, from rank {rank}" for task, rank in panels]
    n_columns = 2
    n_rows = -(-len(panels) // n_columns)
    drawn = make_subplots(n_rows, n_columns, subplot_titles=titles, horizontal_spacing=0.08, vertical_spacing=0.16)
    named: set[str] = set()
    for place, panel in enumerate(panels):
        where = {"row": place // n_columns + 1, "col": place % n_columns + 1}
        n_bytes = statistics.mean(row["n_bytes"] for row in groups[(*panel, 1.0, FULL)])
        star = {"symbol": "star", "size": 12, "color": "#1f2328"}
        drawn.add_trace(
            go.Scatter(x=[n_bytes], y=[100], name="the full adapter", legendgroup=FULL, showlegend=place == 0,
                       mode="markers", marker=star),
            **where,
        )  # fmt: skip
        for line in LINES:
            x, y, errors = _curve(groups, ends, panel, line)
            style = {"color": line.color, "dash": line.dash, "width": 3 if line.name.startswith("lorazor") else 2}
            is_new = bool(x) and line.name not in named
            error = {"type": "data", "array": errors, "thickness": 1.2, "width": 3}
            drawn.add_trace(
                go.Scatter(x=x, y=y, error_y=error, name=line.name, legendgroup=line.name, showlegend=is_new,
                           mode="lines+markers", line=style, marker={"symbol": line.symbol, "size": 8}),
                **where,
            )  # fmt: skip
            named |= {line.name} if x else set()
    drawn.update_xaxes(type="log", title="bytes of the adapter's file", tickformat="~s", dtick="D2")
    drawn.update_yaxes(title="gain that stays (%)", range=[arguments.lowest, 102])
    drawn.update_layout(template="plotly_white", width=1100, height=100 + 360 * n_rows, font={"size": 13},
                        legend={"orientation": "h", "y": -0.12})  # fmt: skip
    drawn.write_image(arguments.out, scale=2)


@dataclass(frozen=True)
class Line:
    """A line of the figure: what a method keeps, before or after healing."""

    name: str
    method: str
    column: str
    color: str
    dash: str
    symbol: str


LINES = (
    Line("lorazor, healed", "fisher", "healed", "#0063a6", "solid", "circle"),
    Line("lorazor", "fisher", "loss", "#0063a6", "dash", "circle-open"),
    Line("SVD, one threshold (PARA), healed", "energy", "healed", "#b35300", "solid", "square"),
    Line("SVD, one threshold (PARA)", "energy", "loss", "#b35300", "dash", "square-open"),
    Line("SVD, one rank, healed (LoRA-Squeeze)", "one rank", "healed", "#8d3f84", "solid", "diamond"),
    Line("that rank trained directly", DIRECT, "loss", "#00735a", "dot", "x"),
    Line("boundary", "boundary", "loss", "#5a626b", "dot", "triangle-up"),
)


def _curve(
    groups: dict[tuple, list[Row]], ends: dict[tuple, dict[str, Row]], panel: tuple[str, int], line: Line
) -> tuple[list[float], list[float], list[float]]:
    """Bytes, share of the gain that stays and its standard error, in per cent, from small to large."""
    if line.method == DIRECT:  # measured against the full adapters of the panel, by their means
        full = [row for row in groups[(*panel, 1.0, FULL)]]
        top = statistics.mean(mean_loss(row["loss"]) for row in full)
        base = statistics.mean(mean_loss(ends[panel[0], row["adapter"]][BASE]["loss"]) for row in full)
        kept = {
            rank: [(row["n_bytes"], 100 * (base - mean_loss(row["loss"])) / (base - top)) for row in rows]
            for (task, rank, _, method), rows in groups.items()
            if task == panel[0] and method == DIRECT and rank < panel[1]
        }
    else:
        kept = {
            share: [
                (row["n_bytes"], 100 - 100 * found[line.column][0])
                for row in rows
                if line.column in (found := _against(ends[task, row["adapter"]], row))
            ]
            for (task, rank, share, method), rows in groups.items()
            if (task, rank, method) == (*panel, line.method)
        }
    points = []
    for own in kept.values():
        if own:
            sizes, gains = zip(*own, strict=True)
            error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else 0.0
            points.append((statistics.mean(sizes), statistics.mean(gains), error))
    x, y, errors = zip(*sorted(points), strict=True) if points else ((), (), ())
    return list(x), list(y), list(errors)


def _grouped(paths: Sequence[Path]) -> tuple[dict[tuple, list[Row]], dict[tuple, dict[str, Row]]]:
    """Rows by task, source rank, share and method; and the full adapter and the base by task and adapter."""
    groups: dict[tuple, list[Row]] = defaultdict(list)
    ends: dict[tuple, dict[str, Row]] = defaultdict(dict)
    latest = {
        (row["task"], row["adapter"], row["method"], row["share"]): row for path in paths for row in rows_of(path)
    }
    for row in latest.values():
        if row["method"] in (FULL, BASE):
            ends[row["task"], row["adapter"]][row["method"]] = row
        if "skipped" not in row:
            groups[row["task"], row["rank"], row["share"], row["method"]].append(row)
    return groups, ends


def _against(ends: dict[str, Row], row: Row) -> dict[str, tuple[float, str]]:
    """Share of the gain that is lost, and the verdict on it, before and after healing."""
    found = {}
    if FULL in ends and BASE in ends:
        for name in ("loss", "healed"):
            if name in row:
                three = [row[name], ends[FULL]["loss"], ends[BASE]["loss"]]
                nats, correct = ([one[column] for one in three] for column in ("nats", "correct"))
                scores = teacher_forced_scores("loss", nats, three[0]["tokens"], correct)
                verdict = judge(scores, Margin.parse(MARGIN), range(len(nats[0])))
                gain = mean_loss(three[2]) - mean_loss(three[1])
                found[name] = (verdict.lost / gain, verdict.outcome)
    return found


def mean_loss(losses: Row) -> float:
    return sum(losses["nats"]) / sum(losses["tokens"])


def _with_error(values: list[float], n_digits: int = 4) -> str:
    if not values:
        return ""
    mean = f"{statistics.mean(values):.{n_digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values) / len(values) ** 0.5:.{n_digits}f}"


def rows_of(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
