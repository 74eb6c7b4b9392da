"""Which sites of a trained adapter to keep: path credit against the boundary, norms, chance, first and last layers.

Every variant keeps at most the same number of parameters of one adapter. Sites are scored on --n-score validation
examples, gates are refitted on training examples, and all is measured on test examples that took no part in either.
Scores count per parameter, norms too. "boundary" is also what keeping the first layers is; "ranks" keeps the components
of highest credit per parameter, at mixed ranks, and its refit learns a gate for each; "energy" does so by squared
singular values, without data. Scores and gates are kept by the names of their sites.

    lorazor train --model MODEL --data TRAIN --method lora --steps 120 --warmup-steps 12 --seed 0 --out ADAPTER
    python benchmarks/which_sites_to_keep.py run --adapter ADAPTER --name seed0 --train TRAIN --dev DEV --test TEST \
        --out results.jsonl
    python benchmarks/which_sites_to_keep.py report results.jsonl

A row of the results is one variant; rows that are there already are not measured again.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _machine import measured_on, say
from torch import Tensor

from lorazor.adapter.components import energy_scores
from lorazor.adapter.folder import read_adapter
from lorazor.adapter.gates import silenced
from lorazor.adapter.load import Loaded, load
from lorazor.adapter.parts import Parts
from lorazor.adapter.summary import site_norms
from lorazor.data.batches import make_batches, make_prompt_batches
from lorazor.data.examples import Example, read_examples
from lorazor.measure.generation import generate_batch
from lorazor.measure.losses import row_losses
from lorazor.measure.metrics import teacher_forced_scores, text_scores
from lorazor.measure.stats import paired_difference
from lorazor.select.credit import gate_gradients, path_credit
from lorazor.select.projection import sites_for_parameters
from lorazor.select.refit import refit_gates
from lorazor.select.scores import control_scores

KINDS = (
    "boundary",
    "boundary+refit",
    "last",
    "random",
    "norm",
    "taylor",
    "credit",
    "credit+refit",
    "energy",
    "ranks",
    "ranks+refit",
)
DROPPED = (29, 50, 70, 90)
VARIANTS = ("full", *(f"{kind}@{percent}" for percent in DROPPED for kind in KINDS))


class Adapter:
    """One trained adapter as sites or as components, its scores and its variants."""

    def __init__(self, arguments: argparse.Namespace, by_components: bool) -> None:
        self.arguments = arguments
        self.loaded = load(arguments.adapter)
        self.sites = self.loaded.sites
        self.parts = (Parts.components_of_ if by_components else Parts.sites_of)(self.sites)
        self.sizes = self.parts.n_parameters
        draw = random.Random
        self.test = draw(0).sample(read_examples(arguments.test), arguments.n_test)
        self.dev = draw(1).sample(read_examples(arguments.dev), arguments.n_score)
        train = read_examples(arguments.train, limit=arguments.n_train)
        self.train = draw(2).sample(train, arguments.refit_steps * 8)

    def scores(self) -> dict[str, dict[str, list[float]]]:
        """Every score of the parts of every site, by its name; kept beside the results."""
        what = "component-scores-by-site" if self.parts.are_components else "scores-by-site"
        path = self.arguments.out.with_name(f"{what}-{self.arguments.name}.json")
        if path.exists():
            return json.loads(path.read_text())
        start = time.perf_counter()
        batches = make_batches(self.dev, self.loaded.tokenizer, self.loaded.task, 8).batches
        model, open_gates = self.loaded.model, torch.ones(len(self.parts))
        credits = path_credit(model, batches, self.parts.gated, open_gates, self.arguments.points)
        found = {"credit": self.by_site(credits.values.tolist())}
        if not self.parts.are_components:
            taylor = gate_gradients(model, batches, self.parts.gated, open_gates)
            found["taylor"] = self.by_site(np.abs(taylor.values).tolist())
            found["norm"] = {one.site.name: [one.norm] for one in site_norms(read_adapter(self.arguments.adapter))}
            found["random"] = self.by_site(control_scores(self.sites, 0)["random"].tolist())
        sums = credits.completeness
        say(f"{self.arguments.name}: {sums}, {sums.error:.3%} off, {time.perf_counter() - start:.0f} s")
        path.write_text(json.dumps(found | {"completeness": vars(sums) | {"error": sums.error}}))
        return found

    def by_site(self, values: Sequence[float]) -> dict[str, list[float]]:
        """Values of the parts as those of each site, by its name."""
        table: dict[str, list[float]] = {}
        for owner, value in zip(self.parts.owners, values, strict=True):
            table.setdefault(owner, []).append(value)
        return table

    def gates(self, variant: str) -> Tensor:
        if variant == "full":
            return torch.ones(len(self.parts))
        kind, _, percent = variant.partition("@")
        kept = self.kept(kind.removesuffix("+refit"), int((1 - int(percent) / 100) * sum(self.sizes)))
        return self.refitted(kept) if kind.endswith("+refit") else kept

    def kept(self, kind: str, budget: int) -> Tensor:
        n_layers = 1 + max(site.layer or 0 for site in self.sites)
        n_kept = budget * n_layers // sum(self.sizes)  # all layers are of one size
        if kind in ("boundary", "last"):
            first = 0 if kind == "boundary" else n_layers - n_kept
            return torch.tensor([float(first <= (site.layer or 0) < first + n_kept) for site in self.sites])
        if kind == "energy":
            by_site = {name: one.tolist() for name, one in energy_scores(read_adapter(self.arguments.adapter)).items()}
        else:
            by_site = self.scores()["credit" if kind == "ranks" else kind]
        values = torch.tensor([value for site in self.sites for value in by_site[site.name]], dtype=torch.float64)
        worth = values if kind == "random" else values / torch.tensor(self.sizes)
        return ((values > 0) & sites_for_parameters(worth, self.sizes, budget)).float()

    def refitted(self, kept: Tensor) -> Tensor:
        batches = make_batches(self.train, self.loaded.tokenizer, self.loaded.task, 8).batches
        random.Random(3).shuffle(batches)
        return refit_gates(self.loaded.model, batches, lambda gates: self.parts.gated(gates, kept != 0), kept)

    def measure(self, gates: Tensor, with_text: bool) -> dict[str, Any]:
        """Losses and answers on the test examples."""
        texts: dict[int, str] = {}
        losses: dict[int, tuple[float, ...]] = {}
        examples = self.test[: self.arguments.n_generate]
        with merged(self.parts, gates):
            for batch in make_batches(self.test, self.loaded.tokenizer, self.loaded.task, 32).batches:
                found = row_losses(self.loaded.model, batch)
                rows = zip(found.nll_nats.tolist(), found.n_tokens.tolist(), found.n_correct.tolist(), strict=True)
                losses.update(zip(batch.indices, rows, strict=True))
            if with_text and self.loaded.task == "causal":
                texts = write(self.loaded, examples)
        return {"losses": [(one.index, *losses[one.index]) for one in self.test], "texts": texts}


def write(loaded: Loaded, examples: Sequence[Example]) -> dict[int, str]:
    bare = Loaded(loaded.model, loaded.tokenizer, loaded.task, [])
    texts = {}
    for prompts in make_prompt_batches(examples, loaded.tokenizer, "causal", 64, max_new_tokens=56).batches:
        texts |= {one.example: one.text for one in generate_batch(bare, prompts, torch.zeros(1, 0), 56)}
    return texts


@contextmanager
def merged(parts: Parts, gates: Tensor) -> Iterator[None]:
    """The gated update added to the base weights inside the block: fewer small operations than LoRA's own."""
    before = []
    with torch.no_grad():
        for index, site in enumerate(parts.sites):
            own = gates[[part for part, owner in enumerate(parts.site_of) if owner == index]]
            weight: Any = site.module.get_base_layer().weight
            before.append(weight.detach().clone())
            B = site.module.lora_B[site.adapter].weight
            trained = B.detach().clone()
            B.mul_(own)
            weight.add_(site.module.get_delta_weight(site.adapter))
            B.copy_(trained)
        with silenced(parts.sites):
            yield
        for site, weight in zip(parts.sites, before, strict=True):
            site.module.get_base_layer().weight.copy_(weight)


def run(arguments: argparse.Namespace) -> None:
    """Measure what is missing."""
    done = {(row["name"], row["variant"]) for row in read_rows([arguments.out])}
    adapters: dict[bool, Adapter] = {}
    for variant in arguments.variants:
        if (arguments.name, variant) in done:
            continue
        start = time.perf_counter()
        by_components = variant.startswith(("ranks", "energy"))
        if by_components not in adapters:
            adapters[by_components] = Adapter(arguments, by_components)
        adapter = adapters[by_components]
        gates = adapter.gates(variant)
        row = {"name": arguments.name, "variant": variant, **adapter.measure(gates, variant in arguments.write)}
        row |= {
            "n_sites": adapter.parts.n_sites_kept(gates),
            "n_parameters": adapter.parts.n_parameters_kept(gates),
            "total": sum(adapter.sizes),
            "gates": adapter.by_site(gates.tolist()),
            "references": {one.index: one.references for one in adapter.test[: arguments.n_generate]},
            "measured_on": measured_on(),
        }
        with arguments.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        values = {metric: round(value, 4) for metric, (value, *_) in values_of(row, row).items()}
        say(f"{arguments.name}, {variant}: {values}, {time.perf_counter() - start:.0f} s")


def read_rows(paths: Sequence[Path]) -> list[dict[str, Any]]:
    return [json.loads(line) for path in paths if path.exists() for line in path.read_text().splitlines()]


def metrics_of(row: dict[str, Any]) -> list[str]:
    is_labelled = all(n_tokens == 1 for _, _, n_tokens, _ in row["losses"])
    return ["loss", "accuracy"] if is_labelled else ["loss", *(["bleu", "rougeL"] if row["texts"] else [])]


def values_of(row: dict[str, Any], full: dict[str, Any]) -> dict[str, tuple[float, float, float]]:
    """Each metric, and the 95 % interval of its difference to the full adapter on the same examples."""
    found = {}
    for metric in metrics_of(row):
        if metric in ("loss", "accuracy"):
            _, nll, tokens, correct = np.array([row["losses"], full["losses"]]).transpose(2, 0, 1)
            scores = teacher_forced_scores(metric, nll, tokens[0], correct)
        else:
            answers = [{int(index): text for index, text in one["texts"].items()} for one in (row, full)]
            references = {int(index): texts for index, texts in full["references"].items()}
            columns = [[texts[index] for index in references] for texts in answers]
            scores = text_scores(metric, columns, list(references.values()))
        difference = paired_difference(scores, 0, 1)
        found[metric] = float(scores.values[0]), difference.low, difference.high
    return found


def report(arguments: argparse.Namespace) -> None:
    """Per variant the metrics of every adapter, averaged, and how often it is significantly worse than the full one."""
    rows = read_rows(arguments.results)
    full = {row["name"]: row for row in rows if row["variant"] == "full"}
    print("| variant | adapters | parameters | loss | accuracy | BLEU | ROUGE-L | difference to full, 95 % interval |")
    print("|---|---|---|---|---|---|---|---|")
    for variant in VARIANTS:
        mine = [row for row in rows if row["variant"] == variant]
        if not mine:
            continue
        measured = [values_of(row, full[row["name"]]) for row in mine]
        share = statistics.fmean(row["n_parameters"] / row["total"] for row in mine)
        cells = [variant, str(len(mine)), f"{share:.1%}"]
        cells += [mean_of(measured, metric) for metric in ("loss", "accuracy", "bleu", "rougeL")]
        main = "accuracy" if "accuracy" in measured[0] else "loss"
        cells.append("; ".join(f"{one[main][1]:+.3f} to {one[main][2]:+.3f}" for one in measured))
        print(f"| {' | '.join(cells)} |")


def mean_of(measured: Sequence[dict[str, tuple[float, float, float]]], metric: str) -> str:
    values = [one[metric][0] for one in measured if metric in one]
    if not values:
        return ""
    scale, digits = (100, 1) if metric == "accuracy" else (1, 3 if metric == "loss" else 1)
    error = f" ± {scale * statistics.stdev(values) / len(values) ** 0.5:.{digits}f}" if len(values) > 1 else ""
    return f"{scale * statistics.fmean(values):.{digits}f}{error}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="score, drop, refit and measure")
    one.add_argument("--adapter", required=True, help="adapter folder")
    one.add_argument("--name", required=True, help="what the results call this adapter")
    one.add_argument("--train", required=True, help="examples to refit on")
    one.add_argument("--n-train", type=int, help="those that the adapter was trained on, if not all")
    one.add_argument("--dev", required=True, help="examples to score on")
    one.add_argument("--test", required=True, help="examples that take no part in anything but the result")
    one.add_argument("--n-score", type=int, default=32)
    one.add_argument("--n-test", type=int, default=256)
    one.add_argument("--n-generate", type=int, default=128)
    one.add_argument("--points", type=int, default=8)
    one.add_argument("--refit-steps", type=int, default=30)
    one.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, metavar="VARIANT")
    one.add_argument(
        "--write", nargs="*", default=list(VARIANTS), metavar="VARIANT", help="also write answers of these"
    )
    one.add_argument("--out", type=Path, required=True, help="results, one line a variant; appended to")
    two = commands.add_parser("report", help="print the table")
    two.add_argument("results", type=Path, nargs="+")
    return parser.parse_args()


if __name__ == "__main__":
    chosen = _arguments()
    run(chosen) if chosen.command == "run" else report(chosen)
