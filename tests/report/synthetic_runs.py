"""Run folders of every command as lorazor leaves them, of any size, from made-up numbers."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lorazor.runs import FORMAT
from lorazor.select.verdict import Outcome, Verdict
from lorazor.selection import SelectedSite, Selection
from lorazor.settings import BoundarySettings, ShrinkSettings

KINDS = {"self_attn.q_proj": 9216, "self_attn.k_proj": 6144, "self_attn.v_proj": 6144, "self_attn.o_proj": 9216}
KINDS |= {"mlp.gate_proj": 16896, "mlp.up_proj": 16896, "mlp.down_proj": 16896}
STACK = "model.layers"
HASH = "4f2a" * 16


def write_json(path: Path, document: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_run(path: Path, command: str, settings: dict[str, Any], finished: bool = True, **more: Any) -> Path:
    versions = {"python": "3.11.7", "lorazor": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2"}
    hashes = {"adapter": HASH, "data": HASH[::-1], "confirm": None}
    document = {"format": FORMAT, "command": command, "settings": settings, "hashes": hashes, "versions": versions}
    write_json(path / "run.json", document | {"finished": finished} | more)
    return path


def interval(estimate: float, error: float = 0.01) -> dict[str, float]:
    low, high = estimate - 1.96 * error, estimate + 1.96 * error
    return {"estimate": estimate, "low": low, "high": high, "standard_error": error}


def site_rows(n_layers: int, outside: Sequence[str] = ("lm_head",)) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"site": f"{STACK}.{layer}.{kind}", "stack": STACK, "layer": layer, "kind": kind, "n_parameters": size}
        for layer in range(n_layers)
        for kind, size in KINDS.items()
    ]
    return rows + [
        {"site": name, "stack": None, "layer": None, "kind": name, "n_parameters": 399000} for name in outside
    ]


def scored(rows: list[dict[str, Any]], seed: int = 0) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    n_layers = 1 + max(row["layer"] or 0 for row in rows)
    result = []
    for row in rows:
        depth = (row["layer"] if row["layer"] is not None else n_layers) / n_layers
        score = row["n_parameters"] / 9e5 * math.exp(-((depth - 0.55) ** 2) / 0.08) * draw.lognormvariate(0, 0.5)
        score -= 0.0004 * draw.random()
        more = {"score": score, "standard_error": abs(score) / 9, "score_per_parameter": score / row["n_parameters"]}
        result.append(row | more)
    return result


RANK = 8


def write_selection(
    path: Path, rows: list[dict[str, Any]], ranks: dict[str, int], method: str, **settings: Any
) -> None:
    """A selection that keeps the sites of `ranks`, each at its rank."""
    sites = tuple(
        SelectedSite(
            name=row["site"],
            layer=row["layer"],
            stack=row["stack"],
            kind=row["kind"],
            rank=RANK,
            keep=row["site"] in ranks,
            score=row.get("score"),
            components=tuple(range(ranks[row["site"]])) if ranks.get(row["site"], RANK) < RANK else None,
        )
        for row in rows
    )
    Selection(sites, method, settings).save(path / "selection.json")


WORDS = (
    "The Eagle is a family friendly coffee shop near the river with English food and a low rating of 3 stars".split()
)


def example_rows(
    n_examples: int, prompt: str = "name[The Eagle], food[English], area[riverside]"
) -> list[dict[str, Any]]:
    return [
        {"example": i, "prompt": f"{prompt}, number[{i}]", "references": [" ".join(WORDS[: 8 + i % 9])], "label": None}
        for i in range(n_examples)
    ]


def measured_rows(variants: Sequence[str], n_examples: int, seed: int = 1) -> tuple[list, list]:
    draw = random.Random(seed)
    losses, texts = [], []
    for i in range(n_examples):
        base = draw.lognormvariate(0.2, 0.4)
        for index, variant in enumerate(variants):
            loss = base if index == 0 else max(0.05, base + draw.gauss(0.03, 0.12))
            measured = {"example": i, "adapter": variant, "key": f"{index:016x}-00000000"}
            losses.append(measured | {"nll_nats": 20 * loss, "n_tokens": 20, "n_correct": 14})
            words = [word for word in WORDS[: 8 + i % 9] if index == 0 or draw.random() > 0.12]
            texts.append(measured | {"text": " ".join(words), "rougeL": 100 * draw.random()})
    return losses, texts


MODEL = {"model": None, "gguf_file": None, "dtype": "float32", "device_map": None}
READING = {"prompt_column": None, "split": None, "limit": 256, "max_length": None, "batch_size": 16}


def verdict(value: float, full: float, outcome: Outcome = "shown") -> dict[str, Any]:
    """On 512 examples, with a margin that gives the outcome."""
    lost = value - full
    margin = {"shown": lost + 0.02, "refuted": lost - 0.003, "undecided": lost + 0.001}[outcome]
    needed = 1234 if outcome == "undecided" else None
    values = Verdict("loss", value, full, 2.55, lost, lost - 0.002, lost + 0.002, margin, 512, 500, needed, outcome)
    return values.to_document()


def boundary_run(path: Path, n_layers: int = 30, n_examples: int = 40, outcome: Outcome = "shown") -> Path:
    settings = dataclasses.asdict(BoundarySettings(rule="best")) | {"model": MODEL, "reading": READING}
    settings |= {"adapter": "adapter", "data": "val.jsonl", "confirm": "test.jsonl"}
    write_run(path, "boundary", settings, notes=["Measured in one pass."])
    rows, chosen = site_rows(n_layers), n_layers * 4 // 5
    write_rows(path / "sites.jsonl", rows)
    kept = {row["site"]: RANK for row in rows if row["layer"] is None or row["layer"] < chosen}
    write_selection(path, rows, kept, "boundary", boundary=chosen, metric="loss")
    values = [1.336 + 1.2 * math.exp(-7 * b / n_layers) for b in range(n_layers + 1)]
    candidates = [
        {"boundary": b, "value": value, "difference": interval(value - values[-1], 0.004 + 0.05 * (1 - b / n_layers))}
        for b, value in enumerate(values)
    ]
    choice = {"rule": "best", "metric": "loss", "higher_is_better": False, "boundary": chosen, "full": n_layers}
    choice |= {"candidates": candidates, "n_examples": 256, "stack": STACK}
    choice["reason"] = f"Boundary {chosen} has the best loss on 256 examples."
    choice["verdict"] = verdict(1.341, 1.336, outcome)
    write_json(path / "choice.json", choice)
    write_rows(path / "examples.jsonl", example_rows(n_examples))
    losses, _ = measured_rows(["full", f"boundary {chosen}"], n_examples)
    write_rows(path / "confirm-losses.jsonl", losses)
    return path


def shrink_settings(**more: Any) -> dict[str, Any]:
    return dataclasses.asdict(ShrinkSettings()) | {"adapter": "adapter", "data": None, "confirm": None} | more


def shrink_run(
    path: Path, n_layers: int = 30, n_examples: int = 200, seed: int = 0, outcome: Outcome = "shown"
) -> Path:
    settings = shrink_settings(margin="2%", data="val.jsonl", confirm="test.jsonl")
    write_run(path, "shrink", settings, notes=["Judging 12.5 % on 512 held-out examples."])
    rows = scored(site_rows(n_layers), seed)
    write_rows(path / "scores.jsonl", rows)
    ordered = sorted(rows, key=lambda row: -row["score_per_parameter"])
    total = sum(row["n_parameters"] for row in rows)

    def ranks(share: float) -> dict[str, int]:
        """More of the better sites, none of the worst."""
        places = {row["site"]: place / len(rows) for place, row in enumerate(ordered)}
        found = {site: round(RANK * (1 - place) ** (1 / share - 1)) for site, place in places.items()}
        return {site: rank for site, rank in found.items() if rank}

    def candidate(share: float) -> dict[str, Any]:
        kept = ranks(share)
        size = sum(row["n_parameters"] * kept[row["site"]] // RANK for row in rows if row["site"] in kept)
        lost = 0.4 * (1 - share) ** 40 + 0.02 * (1 - share) * (1 + seed)
        label = f"{sum(kept.values())} directions" if share < 1 else "full"
        bounds = {"lost": lost, "lost_at_most": lost + 0.004} if share < 1 else {"lost": None, "lost_at_most": None}
        sizes = {"n_sites": len(kept), "n_parameters": size}
        return {"label": label, **sizes, "value": 1.336 + lost, **bounds, "is_healed": False}

    shares = (1, 0.5, 0.25, 0.125, 0.06, 0.09, 0.03)
    candidates = [candidate(share) for share in shares]
    document = {"goal": "margin of 2 % of the gain in loss", "by": "direction", "score": "credit", "basis": "balanced"}
    document |= {"metric": "loss", "higher_is_better": False, "n_examples": 64, "candidates": candidates}
    document |= {"n_sites": len(rows), "n_parameters": total, "chosen": candidates[3]["label"], "margin": 0.0243}
    document |= {"verdict": verdict(1.352, 1.347, outcome), "scoring": {"n_passes": 4, "completeness": COMPLETENESS}}
    document["reason"] = (
        "The best directions of 12.5 %: shown to be within the margin of 2 % of the gain in loss on held-out examples."
    )
    write_json(path / "shrink.json", document)
    write_selection(path, rows, ranks(0.125), "shrink by direction", score="credit", basis="balanced")
    write_rows(path / "examples.jsonl", example_rows(n_examples))
    losses, texts = measured_rows(["full", candidates[3]["label"]], n_examples)
    write_rows(path / "confirm-losses.jsonl", losses)
    write_rows(path / "confirm-predictions.jsonl", texts)
    return path


COMPLETENESS = {"credit_sum": 1.21, "loss_base": 2.55, "loss_full": 1.336, "gain": 1.214, "error": 0.0033}


def weights_run(path: Path, n_layers: int = 6) -> Path:
    """A shrink without data: by the weights alone."""
    write_run(path, "shrink", shrink_settings(energy=0.9))
    rows = [{**row, "standard_error": None} for row in scored(site_rows(n_layers))]
    write_rows(path / "scores.jsonl", rows)
    kept = {row["site"]: 1 + place % RANK for place, row in enumerate(rows) if place % 3}
    write_selection(path, rows, kept, "shrink by direction", score="energy", basis="singular")
    return path


def curves_run(path: Path, n_layers: int = 30) -> Path:
    settings = {"model": MODEL, "reading": READING, "adapter": "adapter", "data": "val.jsonl"}
    write_run(path, "curves", settings | {"stack": None, "settled_within": 0.05})
    rows = [
        {
            "variant": variant,
            "layer": layer,
            "probability": top / (1 + math.exp(-(layer - 0.7 * n_layers) / 2)),
            "probability_standard_error": 0.01,
            "entropy_nats": 7 * (1 - layer / n_layers) + 1.3,
            "entropy_standard_error": 0.05,
            "median_rank": 1 + 9000 * math.exp(-layer / n_layers * 9) * (1 if variant == "adapter" else 3),
        }
        for variant, top in (("adapter", 0.62), ("base", 0.31))
        for layer in range(n_layers + 1)
    ]
    document = {"n_examples": 128, "n_tokens": 3012, "stack": STACK, "n_layers": n_layers, "boundary": 26}
    reason = "After layer 26 the gap to the base model no longer grows."
    write_json(path / "curves.json", document | {"reason": reason, "curves": rows})
    return path


def train_run(path: Path, n_layers: int = 12, n_steps: int = 40) -> Path:
    settings = {"model": MODEL | {"model": "base"}, "reading": READING, "data": "train.jsonl"}
    settings |= {"fit": {"steps": 120, "seed": 0}, "method": "weightlora", "selection": None}
    result = {"n_sites": 42, "n_parameters": 500000, "loss": 1.41, "seconds": 612.0}
    write_run(path, "train", settings, result=result)
    draw = random.Random(2)
    rows = [row | {"gate": draw.random() * 2, "loss-change": draw.random()} for row in site_rows(n_layers, outside=())]
    write_rows(path / "scores.jsonl", rows)
    ordered = sorted(rows, key=lambda row: -row["gate"])
    named = [row | {"score": row["gate"]} for row in rows]
    kept = {row["site"]: RANK for row in ordered[: len(rows) // 2]}
    write_selection(path, named, kept, "weightlora", score="gate")
    gates = [{"step": s + 1, "gates": [1 + (row["gate"] - 1) * s / n_steps for row in rows]} for s in range(n_steps)]
    write_rows(path / "gates.jsonl", gates)
    log = [{"step": step, "loss": 1.4 + 3 * math.exp(-step / 15)} for step in range(1, 120)]
    write_rows(path / "training.jsonl", [*log, {"step": 120, "train_runtime": 612.0}])
    return path


def eval_run(path: Path, n_examples: int = 12) -> Path:
    settings = {"model": MODEL, "reading": READING, "seed": 0, "adapters": ["runs/full", "runs/small", "base"]}
    write_run(path, "eval", settings | {"data": "test.jsonl", "metrics": "loss,rougeL", "base": True})
    names = settings["adapters"]
    values = {"loss": (1.336, 1.352, 2.55), "rougeL": (62.5, 61.9, 20.1)}
    write_json(
        path / "metrics.json",
        [
            {
                "adapter": name,
                "metric": metric,
                "value": value,
                "difference": interval(value - row[0]),
                "n_examples": 12,
            }
            for metric, row in values.items()
            for name, value in zip(names, row, strict=True)
        ],
    )
    write_rows(path / "examples.jsonl", example_rows(n_examples))
    losses, texts = measured_rows(names, n_examples)
    write_rows(path / "losses.jsonl", losses)
    write_rows(path / "predictions.jsonl", texts)
    return path
