"""Balanced directions by credit, healed, lose less than every competitor of the same size, at the same total steps.

Each adapter is cut to shares of its parameters by every method, measured on test examples, healed for the same number
of steps on training examples, and measured again. The full adapter with these steps is the control.

    energy           one threshold on the singular values of all sites, without data (PARA, arXiv:2604.27796)
    one rank         the same rank everywhere by SVD (healed: LoRA-Squeeze, arXiv:2602.10993)
    convert_to_lora  PEFT's own, at that rank
    surgery          singular values reweighted by gradients, sigma_j |u_j' G v_j| (Spectral Surgery, arXiv:2603.03995)
    credit, plain    path credit of singular directions
    balanced         sigma^2 of balanced directions
    credit           path credit of balanced directions

    python benchmarks/how_small.py run --task e2e --adapters seed0 seed1 seed2 --train TRAIN --dev DEV --test TEST \
        --out results.jsonl
    python benchmarks/how_small.py report results.jsonl

Adapters of a task differ by their seed; the report averages over them. A row that is there is not measured again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _machine import measured_on, say
from numpy.typing import NDArray
from peft import convert_to_lora
from safetensors.torch import save_file
from torch import Tensor

from lorazor.adapter.directions import energies, to_balanced_form_
from lorazor.adapter.folder import AdapterFolder, read_adapter
from lorazor.adapter.load import Loaded, load, swap
from lorazor.adapter.parts import Parts
from lorazor.adapter.prune import write_pruned
from lorazor.adapter.sites import site_parameters
from lorazor.data.batches import Batch, make_batches
from lorazor.data.examples import Example, read_examples
from lorazor.errors import BudgetError
from lorazor.measure.gradients import frozen
from lorazor.measure.grams import gram_matrices
from lorazor.measure.losses import differentiable_row_losses, row_losses
from lorazor.select.credit import path_credit
from lorazor.select.search import Family
from lorazor.select.units import Units
from lorazor.settings import DataSettings, ModelSettings, ShrinkSettings
from lorazor.workflow.heal import heal

SHARES = (0.5, 0.3, 0.125, 0.05)
METHODS = ("energy", "one rank", "convert_to_lora", "surgery", "credit, plain", "balanced", "credit")
SINGULAR, BALANCED = "singular", "balanced"
BASIS = {"balanced": BALANCED, "credit": BALANCED}
Factors = dict[str, tuple[Tensor, Tensor]]


class Cuts:
    """One adapter: its scores by every method, and what it loses when it is cut."""

    def __init__(self, adapter: str, arguments: argparse.Namespace) -> None:
        self.arguments, self.folder = arguments, read_adapter(adapter)
        self.parts = Parts(self.folder.sites)
        self.loaded = load(adapter, ModelSettings(arguments.model, arguments.gguf_file))
        self.train, self.test = read_examples(arguments.train), read_examples(arguments.test, limit=arguments.n_test)
        self.scores: dict[str, NDArray[np.float64]] = {"energy": self.parts.from_sites(energies(self.folder)).numpy()}
        self.factors: dict[str, Factors] = {}
        dev = self._batches(read_examples(arguments.dev, limit=arguments.n_score))
        for basis in (SINGULAR, BALANCED):
            self._score(basis, dev)

    def loss(self, loaded: Loaded) -> float:
        """Nats per answer token of the test examples."""
        found = [row_losses(loaded.model, batch) for batch in self._batches(self.test)]
        return sum(float(one.nll_nats.sum()) for one in found) / sum(int(one.n_tokens.sum()) for one in found)

    def cut(self, method: str, share: float, out: Path) -> None:
        """Write the adapter with a share of its parameters.

        Raises:
            BudgetError: the method has no adapter so small.
        """
        if method == "convert_to_lora":
            return self._convert(share, out)
        factors = self.factors[BASIS.get(method, SINGULAR)]
        selection = self.parts.selection(self._gates(method, share), method, {"share": share})
        write_pruned(self.folder.path, selection, out, factors=factors)

    def put(self, folder: AdapterFolder) -> Loaded:
        self.loaded = swap(self.loaded, folder)
        return self.loaded

    def heal(self, smaller: Path) -> Loaded:
        """The smaller adapter after healing, loaded from what was written."""
        reading = DataSettings(batch_size=self.arguments.batch_size)
        settings = ShrinkSettings(heal="train", heal_steps=self.arguments.steps, reading=reading)
        self.loaded = heal(self.loaded, smaller, smaller.with_name(f"{smaller.name}-healed"), self.train, settings)
        return self.loaded

    def _batches(self, examples: list[Example]) -> list[Batch]:
        loaded = self.loaded
        return list(make_batches(examples, loaded.tokenizer, loaded.task, self.arguments.batch_size).batches)

    def _score(self, basis: str, dev: list[Batch]) -> None:
        loaded = self.put(self.folder)
        sites, model = tuple(loaded.sites), loaded.model
        if basis == SINGULAR:
            parts = Parts.singular_(sites)
        else:
            parts = Parts(sites)
            sigma2 = to_balanced_form_(sites, gram_matrices(model, sites, dev))
            self.scores["balanced"] = parts.from_sites(sigma2).numpy()
        name = "credit" if basis == BALANCED else "credit, plain"
        ones = torch.ones(len(parts))
        self.scores[name] = path_credit(model, dev, parts.gated, ones, self.arguments.points).values
        if basis == SINGULAR:
            self.scores["surgery"] = _gate_gradients(loaded, parts, dev).abs().double().numpy()
        live = {site.name: site_parameters(site.module, site.adapter) for site in sites}
        self.factors[basis] = {
            key: (down.detach().cpu().clone(), up.detach().cpu().clone()) for key, (down, up) in live.items()
        }

    def _gates(self, method: str, share: float) -> Tensor:
        if method == "one rank":
            rank, energy = _rank(self.folder, share), self.parts.by_site(torch.as_tensor(self.scores["energy"]))
            ones = {name: torch.topk(own, min(rank, len(own))).indices for name, own in energy.items()}
            return self.parts.from_sites(
                {name: torch.zeros(len(own)).index_fill(0, ones[name], 1) for name, own in energy.items()}
            )
        units, values = Units.of(self.parts, "direction"), self.scores[method]
        budget = int(share * sum(self.parts.n_parameters))
        gates = torch.zeros(len(self.parts))
        gates[units.parts_of(Family.of(units, values).within(budget, 0, values))] = 1
        return gates

    def _convert(self, share: float, out: Path) -> None:
        rank, loaded = _rank(self.folder, share), self.put(self.folder)
        assert loaded.peft_model is not None
        config, state = convert_to_lora(loaded.peft_model, rank=rank)
        config.save_pretrained(str(out))
        save_file({key: value.contiguous() for key, value in state.items()}, str(out / "adapter_model.safetensors"))


def _gate_gradients(loaded: Loaded, parts: Parts, batches: list[Batch]) -> Tensor:
    """(n_parts,), d loss / d gate at gate 1, which is s sigma_j u_j' G v_j for singular directions."""
    gates = torch.ones(len(parts), requires_grad=True)
    with frozen(loaded.model), parts.gated(gates):
        for batch in batches:
            differentiable_row_losses(loaded.model, batch).nll_nats.sum().backward()
    assert gates.grad is not None
    return gates.grad


def _rank(folder: AdapterFolder, share: float) -> int:
    """The rank at which all sites have this share of their parameters."""
    rank = int(share * max(site.rank for site in folder.sites))
    if rank < 1:
        raise BudgetError(f"share={share} is below rank 1.")
    return rank


def run(arguments: argparse.Namespace) -> None:
    for adapter in arguments.adapters:
        keys = [("full", 1.0), *((method, share) for share in arguments.shares for method in METHODS)]
        key = {"task": arguments.task, "adapter": str(Path(adapter).resolve())}
        done = {(row["method"], row["share"]) for row in _rows(arguments.out) if {**row, **key} == row}
        missing = [one for one in keys if one not in done]
        if not missing:
            continue
        cuts = Cuts(adapter, arguments)
        for method, share in missing:
            row = {**key, "rank": max(site.rank for site in cuts.folder.sites), "method": method, "share": share}
            with tempfile.TemporaryDirectory() as place:
                row |= _measured(cuts, method, share, Path(place))
            say(f"{Path(adapter).name}: {method} at {share:.1%}: {row.get('loss')}, healed {row.get('healed')}")
            with arguments.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row | {"steps": arguments.steps, "measured_on": measured_on()}) + "\n")


def _measured(cuts: Cuts, method: str, share: float, place: Path) -> dict[str, Any]:
    """Loss before and after healing, size and seconds; the reason where there is no such adapter."""
    start, smaller = time.perf_counter(), place / "cut"
    try:
        if method == "full":
            shutil.copytree(cuts.folder.path, smaller)
        else:
            cuts.cut(method, share, smaller)
    except BudgetError as error:
        return {"skipped": str(error)}
    folder = read_adapter(smaller)
    size = {"n_parameters": sum(site.n_parameters for site in folder.sites), "n_bytes": folder.weights.stat().st_size}
    losses = {"loss": cuts.loss(cuts.put(folder)), "healed": cuts.loss(cuts.heal(smaller))}
    return size | losses | {"seconds": time.perf_counter() - start}


def report(arguments: argparse.Namespace) -> None:
    """Mean and standard error over the adapters of a task, as a Markdown table."""
    groups: dict[tuple, list[dict[str, Any]]] = defaultdict(list)
    for row in _rows(arguments.results):
        if "skipped" not in row:
            groups[row["task"], row["rank"], row["share"], row["method"]].append(row)
    print("| task | rank | share | method | adapters | parameters | loss | healed |\n|---|---|---|---|---|---|---|---|")
    order = {"full": -1} | {method: index for index, method in enumerate(METHODS)}
    for key in sorted(groups, key=lambda one: (one[0], one[1], -one[2], order[one[3]])):
        rows = groups[key]
        size = statistics.mean(row["n_parameters"] for row in rows)
        cells = [_with_error([row[name] for row in rows]) for name in ("loss", "healed")]
        print(f"| {key[0]} | {key[1]} | {key[2]:.1%} | {key[3]} | {len(rows)} | {size:,.0f} | {' | '.join(cells)} |")


def _with_error(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.4f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values) / len(values) ** 0.5:.4f}"


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(required=True)
    running = commands.add_parser("run", help="cut, measure, heal, measure")
    running.set_defaults(command=run)
    running.add_argument("--task", required=True, help="name of the model and task, for the report")
    running.add_argument("--adapters", nargs="+", required=True, help="adapter folders, one per training seed")
    for name in ("train", "dev", "test"):
        running.add_argument(f"--{name}", required=True, help=f"{name} examples")
    running.add_argument("--model", help="base model, where it is not the one that the adapter names")
    running.add_argument("--gguf-file", help="name of the GGUF file inside the --model folder")
    running.add_argument("--shares", nargs="+", type=float, default=SHARES, help="of the parameters, 0..1")
    running.add_argument("--n-score", type=int, default=64, help="examples of --dev to score on")
    running.add_argument("--n-test", type=int, default=256, help="examples of --test")
    running.add_argument("--points", type=int, default=4, help="of the path of credit")
    running.add_argument("--steps", type=int, default=30, help="of healing")
    running.add_argument("--batch-size", type=int, default=8, help="examples per step")
    running.add_argument("--out", type=Path, required=True, help="JSON lines; rows are appended")
    reporting = commands.add_parser("report", help="print the table")
    reporting.set_defaults(command=report)
    reporting.add_argument("results", type=Path)
    arguments = parser.parse_args()
    arguments.command(arguments)


if __name__ == "__main__":
    main()
