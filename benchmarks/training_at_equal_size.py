"""What a training ends with at one final size: every way of spending the same parameters, on equal steps and batches.

All methods train on the same --steps batches in the same order, and end with at most --shares of the parameters of LoRA
of rank 8 on all sites ("full", which keeps them all). A method that chooses does so within these steps. Every training
ends in an adapter folder, which is counted and measured as stock PEFT would load it.

    python benchmarks/training_at_equal_size.py run --name E2E --model MODEL --train TRAIN --dev DEV --test TEST --out R
    python benchmarks/training_at_equal_size.py report R

A row of the results is one training; rows that are there already are not measured again.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _machine import measured_on, say
from _ways_to_train import METHODS, Experiment

from lorazor import Loaded, Site, load, read_examples
from lorazor.adapter.folder import read_adapter
from lorazor.data.batches import make_batches
from lorazor.measure.losses import row_losses

ALL = ("base", *METHODS)


def measured(experiment: Experiment, loaded: Loaded) -> dict[str, float]:
    """What a model does on the test examples."""
    assert loaded.task != "question-answering"
    encoding = make_batches(experiment.test, loaded.tokenizer, loaded.task, 8)
    losses = [row_losses(loaded.model.eval(), batch) for batch in encoding.batches]
    n_tokens = sum(float(one.n_tokens.sum()) for one in losses)
    return {
        "loss": sum(float(one.nll_nats.sum()) for one in losses) / n_tokens,
        "accuracy": 100 * sum(float(one.n_correct.sum()) for one in losses) / n_tokens,
    }


def run(arguments: argparse.Namespace) -> None:
    """Measure what is missing, seed by seed."""
    done = {(row["seed"], row["method"], row["share"]) for row in read_rows([arguments.out])}
    train, dev = read_examples(arguments.train, limit=arguments.n_train), read_examples(arguments.dev)
    test = read_examples(arguments.test)
    test = random.Random(0).sample(test, min(arguments.n_test, len(test)))
    dev = random.Random(0).sample(dev, min(arguments.n_dev, len(dev)))
    for seed in arguments.seeds:
        order = random.Random(seed).sample(train, len(train))  # healing takes rows that training has not seen
        with tempfile.TemporaryDirectory() as folder:
            experiment = Experiment(arguments, seed, order, dev, test, Path(folder))
            for method in arguments.methods:
                for share in [1.0] if method in ("base", "full") else arguments.shares:
                    if (seed, method, share) not in done:
                        note(experiment, method, share)


def note(experiment: Experiment, method: str, share: float) -> None:
    """Train, measure, and add the row to the results."""
    start, args = time.perf_counter(), experiment.arguments
    sites: Sequence[Site] = ()
    if method == "base":  # with the head that every training starts from
        loaded = experiment.start().base()
    else:
        n_parameters = int(share * sum(site.n_parameters for site in experiment.sites))
        try:
            folder = METHODS[method](experiment, n_parameters)
        except ValueError as error:
            say(f"seed {experiment.seed}, {method}, {share:.1%}: {error}")
            return
        loaded, sites = load(folder, experiment.settings().model), read_adapter(folder).sites
    row = {
        "task": args.name,
        "seed": experiment.seed,
        "method": method,
        "share": share,
        "n_sites": len(sites),
        "n_parameters": sum(site.n_parameters for site in sites),
        "ranks": sorted({site.rank for site in sites}),
        "seconds": time.perf_counter() - start,
        **measured(experiment, loaded),
        "steps": args.steps,
        "select_steps": args.select_steps,
        "batch_size": args.batch_size,
        "n_test": len(experiment.test),
        "commit": measured_on()["commit"],
    }
    with args.out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    size, loss = f"{row['n_parameters']:,}", f"{row['loss']:.4f}"
    say(f"seed {row['seed']}, {method}, {share:.1%}: {size}, {loss}, {row['seconds']:.0f} s")
    gc.collect()


def read_rows(paths: Sequence[Path]) -> list[dict[str, Any]]:
    return [json.loads(line) for path in paths if path.exists() for line in path.read_text().splitlines()]


def report(arguments: argparse.Namespace) -> None:
    """A table for each task: means and standard errors over the seeds; differences are taken within a seed."""
    rows = read_rows(arguments.results)
    for task in dict.fromkeys(row["task"] for row in rows):
        mine = [row for row in rows if row["task"] == task]
        for share in sorted({row["share"] for row in mine if row["share"] < 1}, reverse=True):
            head = ["method", "seeds", "sites", "parameters", "loss", f"above {arguments.against}", "% of the gain"]
            print(f"\n**{task}, {share:.1%}**\n\n| {' | '.join(head)} |\n{'|---' * len(head)}|")
            cells = {(row["method"], row["seed"]): row for row in mine if row["share"] in (share, 1.0)}
            for method in ALL:
                if any(name == method for name, _ in cells):
                    print(line(method, arguments.against, cells))


def line(method: str, against: str, cells: Mapping[tuple[str, int], dict[str, Any]]) -> str:
    """A row of the table; what is compared is compared within a seed."""
    own = {seed: row for (name, seed), row in cells.items() if name == method}
    sites, sizes = (statistics.fmean(row[key] for row in own.values()) for key in ("n_sites", "n_parameters"))
    losses = {
        name: {seed: row["loss"] for (one, seed), row in cells.items() if one == name}
        for name in ("base", "full", against)
    }
    above = [row["loss"] - losses[against][seed] for seed, row in own.items() if seed in losses[against]]
    both = [seed for seed in own if seed in losses["base"] and seed in losses["full"]]
    gains = [(losses["base"][one] - own[one]["loss"]) / (losses["base"][one] - losses["full"][one]) for one in both]
    values = [spread([row["loss"] for row in own.values()]), spread(above), spread([100 * one for one in gains], 1)]
    return f"| {method} | {len(own)} | {sites:.0f} | {sizes:,.0f} | {' | '.join(values)} |"


def spread(values: Sequence[float], digits: int = 4) -> str:
    """Mean and standard error."""
    if not values:
        return ""
    error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{error}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="train and measure")
    one.add_argument("--name", required=True, help="of the task, in the results")
    one.add_argument("--model", required=True, help="base model: hub id or folder")
    one.add_argument("--gguf-file", help="name of the GGUF file inside the --model folder")
    one.add_argument("--target-modules", default="all-linear", help="all-linear, or names separated by commas")
    one.add_argument("--train", required=True, help="examples to train on")
    one.add_argument("--dev", required=True, help="validation examples; only shrink looks at them")
    one.add_argument("--test", required=True, help="examples that take no part in anything but the result")
    one.add_argument("--n-train", type=int, help="use the first so many training examples")
    one.add_argument("--n-dev", type=int, default=64)
    one.add_argument("--n-test", type=int, default=256, help="test examples, drawn at random once")
    one.add_argument("--shares", type=float, nargs="+", default=[0.125, 0.05], help="of the parameters of 'full'")
    one.add_argument("--steps", type=int, default=300, help="optimizer steps")
    one.add_argument("--select-steps", type=int, default=100, help="of these, the warm-up")
    one.add_argument("--heal-steps", type=int, default=60, help="of these, healing after shrinking")
    one.add_argument("--heal-lr", type=float, default=5e-4)
    one.add_argument("--rise-steps", type=int, default=10)
    one.add_argument("--batch-size", type=int, default=4)
    one.add_argument("--learning-rate", type=float, default=1e-3)
    one.add_argument("--gate-lr", type=float, default=5.0)
    one.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    one.add_argument("--methods", nargs="+", default=list(ALL), choices=ALL, metavar="METHOD")
    one.add_argument("--out", type=Path, required=True, help="results, one line a training; appended to")
    two = commands.add_parser("report", help="print the tables")
    two.add_argument("results", type=Path, nargs="+")
    two.add_argument("--against", default="low rank", choices=METHODS, help="what differences are taken to")
    return parser.parse_args()


if __name__ == "__main__":
    chosen = _arguments()
    run(chosen) if chosen.command == "run" else report(chosen)
