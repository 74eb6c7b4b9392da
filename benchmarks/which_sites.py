"""WeightLoRA's choice of sites against full LoRA, LoRA of equal size, and chance, at equal steps and data.

Every method trains for --steps optimizer steps on the same batches. A method that chooses sites spends the first
--select-steps of them on a warm-up over all sites; all scores are observed in one and the same warm-up, and each choice
goes on from it with the chosen sites. The controls "random", "first-layers" and "last-layers" need no warm-up: they are
fresh LoRAs that train all steps; "random, warm" goes on from the warm-up like the choices.

    python benchmarks/which_sites.py run --model MODEL --train TRAIN --test TEST --keep 21 --out results.jsonl
    python benchmarks/which_sites.py report results.jsonl

A row of the results is one training; rows that are there already are not measured again.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from _machine import measured_on, say
from peft import PeftModel

from lorazor.adapter.growth import grown_rank
from lorazor.adapter.load import Loaded
from lorazor.adapter.parts import Parts
from lorazor.adapter.prune import write_pruned
from lorazor.adapter.sites import LiveSite, find_sites
from lorazor.data.batches import make_batches, make_prompt_batches
from lorazor.data.examples import Example, read_examples
from lorazor.measure.generation import generate_batch
from lorazor.measure.losses import row_losses
from lorazor.measure.metrics import text_scores
from lorazor.select.projection import sites_for_count, sites_for_parameters
from lorazor.select.scores import control_scores
from lorazor.select.weightlora import Schedule, WeightLoraSettings
from lorazor.selection import SelectedSite, Selection
from lorazor.settings import FitSettings, LoraSettings, ModelSettings
from lorazor.train.answers import make_rows
from lorazor.train.choose import ChooseSites
from lorazor.train.disconnect import grow_, shapes_of
from lorazor.train.fit import fit
from lorazor.train.start import Start

SCRATCH = ("full", "low-rank", "random", "first-layers", "last-layers")
"""Fresh LoRAs that train all steps."""

WARM = (
    "gate",
    "loss-change",
    "probe",
    "gate-norm",
    "weightlora+",
    "gate, equal parameters",
    "loss-change, equal parameters",
    "loss-change per parameter, equal parameters",
    "random, warm",
)
"""Choices that go on from one warm-up without projection."""

FRESH = ("gate, fresh start", "loss-change, fresh start")
"""The same choices, untrained, for the steps that are left."""

SCHEDULES: tuple[Schedule, ...] = ("progressive", "every-step")
"""WeightLoRA's gates with a warm-up of their own, which drops sites as it goes."""

METHODS = (*SCRATCH, *WARM, *FRESH, *SCHEDULES)


@dataclass
class Experiment:
    """One seed: the model, the data, and where results go."""

    arguments: argparse.Namespace
    seed: int
    train: list[Example]
    test: list[Example]
    folder: Path

    @property
    def training(self) -> FitSettings:
        rises = self.arguments.steps // 10
        args = self.arguments
        return FitSettings(args.steps, args.learning_rate, rises, save_steps=10**9, seed=self.seed)

    def start(self, rank: int = 8) -> Start:
        """Makes the models: the same numbers each time, for one seed."""
        model = ModelSettings(self.arguments.model, self.arguments.gguf_file, "float32", "cpu", self.arguments.task)
        lora = LoraSettings(rank, 2 * rank, target_modules=self.arguments.target_modules)
        return Start(model, lora, self.seed, self.train)

    def fit(self, model: PeftModel, loaded: Loaded, span: range | None = None) -> float:
        """Seconds of a training."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        rows, _ = make_rows(loaded, self.train)
        return fit(model, loaded, rows, folder, self.training, self.arguments.batch_size, span).seconds

    def scratch(self, method: str) -> dict[str, Any]:
        """A fresh LoRA on all sites or on those of a control, for all steps."""
        loaded, model = self.start(rank=1 if method == "low-rank" else 8).on_all()
        if method not in ("full", "low-rank"):
            sites = find_sites(model)
            scores = control_scores(sites, self.seed)[method]
            kept = sites_for_count(scores, self.arguments.keep)
            loaded, model = self.start().on_chosen(as_selection(method, map(vars, sites), scores, kept))
        return self.finish(model, loaded, self.fit(model, loaded))

    def warmup(self, schedule: Schedule) -> Path:
        """The warm-up's folder: the adapter on all sites, scores.jsonl and selection.json."""
        folder = self.folder / f"warmup-{schedule}"
        if (folder / "seconds").exists():
            return folder
        shutil.rmtree(folder, ignore_errors=True)
        loaded, model = self.start().on_all()
        args = self.arguments
        settings = WeightLoraSettings(args.keep, args.select_steps, schedule, args.gate_lr, args.select_steps // 4)
        rows, _ = make_rows(loaded, self.train)
        span, callback = range(args.select_steps), ChooseSites(settings, self.seed)
        fitted = fit(model, loaded, rows, folder, self.training, args.batch_size, span, [callback], save_to=folder)
        (folder / "seconds").write_text(str(fitted.seconds))
        return folder

    def chosen(self, method: str) -> dict[str, Any]:
        """Go on from a warm-up with the chosen sites, for the steps that are left."""
        warmup = self.warmup(method if method in SCHEDULES else "one-cut")
        selection = self.selection(method, warmup)
        if method in FRESH:
            loaded, model = self.start().on_chosen(selection)
        else:
            kept = Path(tempfile.mkdtemp(dir=self.folder)) / "kept"
            write_pruned(warmup, selection, kept)
            loaded, model = self.start().from_adapter(kept, selection)
        if method == "weightlora+":
            sites = find_sites(model)
            ranks = [
                grown_rank(site.rank, len(selection.sites), len(sites), shape.limit)
                for site, shape in zip(sites, shapes_of(sites), strict=True)
            ]
            grow_(model, sites, ranks, torch.Generator().manual_seed(self.seed))
        span = range(self.arguments.select_steps, self.arguments.steps)
        seconds = float((warmup / "seconds").read_text()) + self.fit(model, loaded, span)
        return self.finish(model, loaded, seconds)

    def selection(self, method: str, warmup: Path) -> Selection:
        if method in SCHEDULES:
            return Selection.load(warmup / "selection.json")
        rows = [json.loads(line) for line in (warmup / "scores.jsonl").read_text().splitlines()]
        sizes = [row["n_parameters"] for row in rows]
        name = "gate" if method == "weightlora+" else method.split(",")[0].removesuffix(" per parameter")
        scores = [row[name] for row in rows]
        if "per parameter" in method:
            scores = [score / size for score, size in zip(scores, sizes, strict=True)]
        if "equal parameters" in method:
            kept = sites_for_parameters(scores, sizes, sum(sizes) * self.arguments.keep // len(sizes))
        else:
            kept = sites_for_count(scores, self.arguments.keep)
        sites = [row | {"name": row["site"]} for row in rows]
        return as_selection(method, sites, torch.tensor(scores), kept)

    def finish(self, model: PeftModel, loaded: Loaded, seconds: float) -> dict[str, Any]:
        """What became of a training: its size, and what it does on the test examples."""
        sites = find_sites(model)
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        model.save_pretrained(str(folder))
        saved = saved_bytes(model, loaded, self.train[: self.arguments.batch_size])
        model.eval()
        measured = self.measure(replace(loaded, sites=sites))
        return {
            "n_sites": len(sites),
            "n_parameters": sum(site.n_parameters for site in sites),
            "ranks": sorted({site.rank for site in sites}),
            "adapter_bytes": (folder / "adapter_model.safetensors").stat().st_size,
            "saved_bytes": saved,
            "train_seconds": seconds,
            "by_layer": by_layer(sites),
            **measured,
        }

    def measure(self, loaded: Loaded) -> dict[str, Any]:
        encoding = make_batches(self.test, loaded.tokenizer, loaded.task, 8)
        losses = [row_losses(loaded.model, batch) for batch in encoding.batches]
        n_tokens = sum(float(one.n_tokens.sum()) for one in losses)
        result = {
            "loss": sum(float(one.nll_nats.sum()) for one in losses) / n_tokens,
            "accuracy": 100 * sum(float(one.n_correct.sum()) for one in losses) / n_tokens,
        }
        if loaded.task == "causal" and self.arguments.n_generate:
            result["rougeL"] = self.rouge(loaded, self.test[: self.arguments.n_generate])
        return result

    def rouge(self, loaded: Loaded, examples: list[Example]) -> float:
        texts: dict[int, str] = {}
        parts = Parts(tuple(loaded.sites))
        gates = torch.ones(1, len(parts))
        for prompts in make_prompt_batches(examples, loaded.tokenizer, "causal", 16, max_new_tokens=56).batches:
            for one in generate_batch(loaded, parts, prompts, gates, 56):
                texts[one.example] = one.text
        columns = [[texts[example.index] for example in examples]]
        return float(text_scores("rougeL", columns, [example.references for example in examples]).values[0])


def as_selection(
    method: str, sites: Iterable[Mapping[str, Any]], scores: torch.Tensor, kept: torch.Tensor
) -> Selection:
    """The choice in the form that everything else starts from."""
    entries = (
        SelectedSite(site["name"], site["layer"], site["stack"], site["kind"], 8, stays, score=score)
        for site, score, stays in zip(sites, scores.tolist(), kept.tolist(), strict=True)
    )
    return Selection(tuple(entries), method)


def saved_bytes(model: PeftModel, loaded: Loaded, examples: Sequence[Example]) -> int:
    """Bytes that the backward pass of one batch needs, parameters apart, each storage counted once."""
    batch = make_batches(examples, loaded.tokenizer, loaded.task, len(examples)).batches[0]
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(**batch.inputs).logits  # keeps the graph, and with it the storages, alive
        total = sum(storages.values())
    del logits
    return total


def by_layer(sites: Sequence[LiveSite]) -> dict[str, int]:
    """How many sites stayed in each layer."""
    counts: dict[str, int] = {}
    for site in sites:
        counts[str(site.layer)] = counts.get(str(site.layer), 0) + 1
    return counts


@contextmanager
def working_folder(path: Path | None) -> Iterator[Path]:
    if path is not None:
        path.mkdir(parents=True, exist_ok=True)
        yield path
        return
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def run(arguments: argparse.Namespace) -> None:
    """Measure what is missing, seed by seed."""
    done = {(row["seed"], row["method"]) for row in read_rows([arguments.out])}
    train = read_examples(arguments.train, limit=arguments.n_train)
    test = read_examples(arguments.test)
    test = random.Random(0).sample(test, min(arguments.n_test, len(test)))
    for seed in arguments.seeds:
        with working_folder(arguments.work and arguments.work / f"seed{seed}") as folder:
            experiment = Experiment(arguments, seed, train, test, folder)
            for method in arguments.methods:
                if (seed, method) in done:
                    continue
                start = time.perf_counter()
                result = experiment.scratch(method) if method in SCRATCH else experiment.chosen(method)
                row = {"seed": seed, "method": method, **result, "measured_on": measured_on()}
                row["settings"] = {name: str(value) for name, value in vars(arguments).items() if name != "command"}
                with arguments.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                shown = {name: row[name] for name in ("n_parameters", "loss", "accuracy", "rougeL") if name in row}
                say(f"seed {seed}, {method}: {shown}, {time.perf_counter() - start:.0f} s")
                gc.collect()


def read_rows(paths: Sequence[Path]) -> list[dict[str, Any]]:
    return [json.loads(line) for path in paths if path.exists() for line in path.read_text().splitlines()]


def report(arguments: argparse.Namespace) -> None:
    """A table of means and standard errors over the seeds, and each method's difference to "random", by seed."""
    rows = read_rows(arguments.results)
    metrics = [name for name in ("loss", "accuracy", "rougeL") if all(name in row for row in rows)]
    table = {(row["method"], row["seed"]): row for row in rows}
    head = ["method", "seeds", "sites", "parameters", "adapter MB", "saved activations MB", *metrics]
    print(f"| {' | '.join([*head, f'{metrics[0]} minus that of random'])} |")
    print("|---" * (len(head) + 1) + "|")
    for method in METHODS:
        mine = [row for row in rows if row["method"] == method]
        if not mine:
            continue
        cells = [method, str(len(mine)), mean(mine, "n_sites", 0), mean(mine, "n_parameters", 0)]
        cells += [mean(mine, "adapter_bytes", 2, 1e6), mean(mine, "saved_bytes", 0, 1e6)]
        cells += [f"{mean(mine, name, 3)} ± {error(mine, name)}" for name in metrics]
        pairs = [(row, table.get(("random", row["seed"]))) for row in mine]
        differences = [{"d": row[metrics[0]] - other[metrics[0]]} for row, other in pairs if other]
        cells.append(f"{mean(differences, 'd', 3)} ± {error(differences, 'd')}" if differences else "")
        print(f"| {' | '.join(cells)} |")


def mean(rows: Sequence[dict[str, Any]], name: str, digits: int, unit: float = 1) -> str:
    return f"{statistics.fmean(row[name] for row in rows) / unit:,.{digits}f}"


def error(rows: Sequence[dict[str, Any]], name: str) -> str:
    values = [row[name] for row in rows]
    return "?" if len(values) < 2 else f"{statistics.stdev(values) / len(values) ** 0.5:.3f}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="train and measure")
    one.add_argument("--model", required=True, help="base model: hub id or folder")
    one.add_argument("--gguf-file", help="name of the GGUF file inside the --model folder")
    one.add_argument("--task", default="causal", choices=["causal", "classification"])
    one.add_argument("--target-modules", default="all-linear", help="all-linear, or names separated by commas")
    one.add_argument("--train", required=True, help="examples to train on")
    one.add_argument("--test", required=True, help="examples that take no part in anything but the result")
    one.add_argument("--n-train", type=int, help="use the first so many training examples")
    one.add_argument("--n-test", type=int, default=128, help="test examples, drawn at random once")
    one.add_argument("--n-generate", type=int, default=48, help="of these, write answers for so many; 0 for none")
    one.add_argument("--keep", type=int, required=True, help="K, sites")
    one.add_argument("--steps", type=int, default=100, help="optimizer steps")
    one.add_argument("--select-steps", type=int, default=40, help="of these, the warm-up")
    one.add_argument("--batch-size", type=int, default=4)
    one.add_argument("--learning-rate", type=float, default=1e-3)
    one.add_argument("--gate-lr", type=float, default=5.0)
    one.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    one.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, metavar="METHOD")
    one.add_argument("--work", type=Path, help="keep adapters and warm-ups in this folder")
    one.add_argument("--out", type=Path, required=True, help="results, one line a training; appended to")
    two = commands.add_parser("report", help="print the table")
    two.add_argument("results", type=Path, nargs="+")
    return parser.parse_args()


if __name__ == "__main__":
    chosen = _arguments()
    run(chosen) if chosen.command == "run" else report(chosen)
