"""What an adapter loses by being cut to a size, by lorazor and by every competitor, before and after the same healing.

Each adapter is cut to shares of its parameters by every method and measured on test examples; those that `--healed`
names are then trained for some steps on training examples, and measured again. The full adapter with these steps is
the control.

    energy             one threshold on the singular values of all sites, without data (PARA, arXiv:2604.27796)
    energy per size    the same, of sigma^2 per parameter
    one rank           the same rank everywhere by SVD (healed: LoRA-Squeeze, arXiv:2602.10993)
    convert_to_lora    PEFT's own, at that rank
    surgery            singular values reweighted by gradients, sigma_j |u_j' G v_j| (Spectral Surgery, 2603.03995)
    plain credit       path credit of singular directions
    balanced           sigma^2 of balanced directions
    fisher             Fisher information of balanced directions
    credit             path credit of balanced directions
    balanced one rank  the same rank everywhere by sigma^2 of balanced directions
    boundary           the first layers (arXiv:2503.23360)

    python benchmarks/how_small.py run --task e2e --adapters seed0 seed1 seed2 --train TRAIN --dev DEV --test TEST \
        --healed 0.125:credit,energy 0.05:credit --out results.jsonl
    python benchmarks/how_small.py report results.jsonl

Adapters of a task differ by their seed; the report averages over them. An adapter that was trained directly at a small
rank is given as `--direct`: it is measured, and not cut. A row that is there is not measured again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from _cut_results import BASE, DIRECT, FULL, METHODS, Row, figure, mean_loss, report, rows_of
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
from lorazor.adapter.sites import LiveSite, site_parameters
from lorazor.data.batches import Batch, make_batches
from lorazor.data.examples import Example, read_examples
from lorazor.errors import BudgetError, MeasureError
from lorazor.measure.gradients import frozen, gram_matrices
from lorazor.measure.losses import differentiable_row_losses, row_losses
from lorazor.select.credit import gate_slopes, path_credit
from lorazor.select.search import Family, Units
from lorazor.settings import DataSettings, ModelSettings, ShrinkSettings
from lorazor.train.answers import make_rows
from lorazor.workflow.heal import heal

SHARES = (0.5, 0.3, 0.125, 0.05)
SINGULAR, BALANCED = "singular", "balanced"
BASIS = {"balanced": BALANCED, "fisher": BALANCED, "credit": BALANCED, "balanced one rank": BALANCED}
VALUES = {"one rank": "energy", "balanced one rank": "balanced", "energy per size": "energy", "boundary": "energy"}
NO_PASS = ("energy", "energy per size", "one rank", "convert_to_lora", "boundary")
Factors = dict[str, tuple[Tensor, Tensor]]


class Cuts:
    """One adapter: its scores by every method, and what it loses when it is cut."""

    def __init__(self, adapter: str, arguments: argparse.Namespace) -> None:
        self.arguments, self.folder = arguments, read_adapter(adapter)
        self.parts = Parts(self.folder.sites)
        self.loaded = load(adapter, ModelSettings(arguments.model, arguments.gguf_file))
        self.train = read_examples(arguments.train)
        self.test = self._batches(read_examples(arguments.test, limit=arguments.n_test))
        self.scores: dict[str, NDArray[np.float64]] = {"energy": self.parts.from_sites(energies(self.folder)).numpy()}
        self.factors: dict[str, Factors] = {}

    def score(self) -> float:
        """Score in both bases; seconds that it took."""
        start = time.perf_counter()
        dev = self._batches(read_examples(self.arguments.dev, limit=self.arguments.n_score))
        for basis in {BASIS.get(method, SINGULAR): None for method in self.arguments.methods if method not in NO_PASS}:
            self._score(basis, dev)
        return time.perf_counter() - start

    def losses(self, loaded: Loaded) -> Row:
        """Nats and right tokens of the test examples, in their order."""
        found: dict[int, tuple[float, int, int]] = {}
        for batch in self.test:
            one = row_losses(loaded.model, batch)
            columns = one.nll_nats.tolist(), one.n_tokens.int().tolist(), one.n_correct.int().tolist()
            found |= dict(zip(batch.indices, zip(*columns, strict=True), strict=True))
        nats, tokens, correct = zip(*(found[index] for index in sorted(found)), strict=True)
        return {"nats": [round(one, 5) for one in nats], "tokens": tokens, "correct": correct}

    def cut(self, method: str, share: float, out: Path) -> None:
        """Write the adapter with a share of its parameters.

        Raises:
            BudgetError: the method has no adapter so small.
        """
        if method == "convert_to_lora":
            return self._convert(share, out)
        factors = self.factors.get(BASIS.get(method, SINGULAR))  # none: the singular directions of the folder
        selection = self.parts.selection(self._gates(method, share), method, {"share": share})
        write_pruned(self.folder.path, selection, out, factors=factors)

    def put(self, folder: AdapterFolder) -> Loaded:
        self.loaded = swap(self.loaded, folder)
        return self.loaded

    def heal(self, smaller: Path) -> Loaded:
        """The smaller adapter after healing, by cross-entropy on the answers or by distillation from the full one."""
        arguments = self.arguments
        settings = ShrinkSettings(
            heal="train",
            heal_steps=arguments.steps,
            heal_from=arguments.heal_from,
            heal_lr=arguments.heal_lr,
            precision=arguments.precision,
            reading=DataSettings(batch_size=arguments.heal_batch_size),
        )
        teacher = self.folder if arguments.heal_from == "full" else None
        healed = smaller.with_name(f"{smaller.name}-healed")
        rows, _ = make_rows(self.loaded, self.train)
        self.loaded = heal(self.loaded, smaller, healed, rows, settings, teacher)
        return self.loaded

    def _batches(self, examples: list[Example]) -> list[Batch]:
        loaded = self.loaded
        return list(make_batches(examples, loaded.tokenizer, loaded.task, self.arguments.batch_size).batches)

    def _score(self, basis: str, dev: list[Batch]) -> None:
        loaded = self.put(self.folder)
        sites, model = tuple(loaded.sites), loaded.model
        if basis == SINGULAR:
            parts = Parts.singular_(sites)
            if "surgery" in self.arguments.methods:
                self.scores["surgery"] = _gate_gradients(loaded, parts, dev).abs().double().numpy()
        else:
            parts = Parts(sites)
            sigma2 = to_balanced_form_(sites, gram_matrices(model, sites, dev))
            self.scores["balanced"] = parts.from_sites(sigma2).numpy()
        name, ones = "credit" if basis == BALANCED else "plain credit", torch.ones(len(parts))
        if basis == BALANCED and "fisher" in self.arguments.methods:
            self.scores["fisher"] = (gate_slopes(model, dev, parts.gated, ones)[0] ** 2).sum(axis=0)
        if name in self.arguments.methods:
            self.scores[name] = path_credit(model, dev, parts.gated, ones, self.arguments.points).values
        self.factors[basis] = {site.name: _factors(site) for site in sites}

    def _gates(self, method: str, share: float) -> Tensor:
        values, gates = self.scores[VALUES.get(method, method)], torch.zeros(len(self.parts))
        budget = int(share * sum(self.parts.n_parameters))
        if method.endswith("one rank"):
            rank = _rank(self.folder, share)
            best = {name: torch.topk(own, rank).indices for name, own in self.parts.by_site(values).items()}
            return self.parts.from_sites({name: _ones(own, self.parts, name) for name, own in best.items()})
        if method == "energy":
            order = np.argsort(-values, kind="stable")
            sizes = np.cumsum(np.array(self.parts.n_parameters)[order])
            gates[order[: int(np.searchsorted(sizes, budget, side="right"))].tolist()] = 1
            return gates
        units = Units.of(self.parts, "prefix" if method == "boundary" else "direction")
        gates[units.parts_of(Family.of(units, values).within(budget))] = 1
        return gates

    def _convert(self, share: float, out: Path) -> None:
        rank, loaded = _rank(self.folder, share), self.put(self.folder)
        assert loaded.peft_model is not None
        config, state = convert_to_lora(loaded.peft_model, rank=rank)
        config.save_pretrained(str(out))
        save_file({key: value.contiguous() for key, value in state.items()}, str(out / "adapter_model.safetensors"))


def _factors(site: LiveSite) -> tuple[Tensor, Tensor]:
    down, up = site_parameters(site.module, site.adapter)
    return down.detach().cpu().clone(), up.detach().cpu().clone()


def _ones(places: Tensor, parts: Parts, name: str) -> Tensor:
    rank = next(site.rank for site in parts.sites if site.name == name)
    return torch.zeros(rank).index_fill(0, places, 1.0)


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
    rank = int(share * max(site.rank for site in folder.sites) + 1e-9)
    if rank < 1:
        raise BudgetError(f"share={share} is below rank 1.")
    return rank


def run(arguments: argparse.Namespace) -> None:
    healed = {(float(share), name) for share, _, names in (one.partition(":") for one in arguments.healed)
              for name in names.split(",")} | ({(1.0, FULL)} if arguments.heal_from == "labels" else set())  # fmt: skip
    cut = [(method, share) for share in arguments.shares for method in arguments.methods]
    for adapter in [*arguments.adapters, *arguments.direct]:
        is_direct = adapter in arguments.direct
        wanted = [(method, share, (share, method) in healed) for method, share in [(FULL, 1.0), (BASE, 0.0), *cut]]
        _run_one(adapter, [(DIRECT, 1.0, False)] if is_direct else wanted, arguments)


def _run_one(adapter: str, wanted: list[tuple[str, float, bool]], arguments: argparse.Namespace) -> None:
    key = {"task": arguments.task, "adapter": Path(adapter).name}
    rows = [row for row in rows_of(arguments.out) if {**row, **key} == row]
    done = {(row["method"], row["share"], "healed" in row) for row in rows}
    missing = [
        (method, share, heals)
        for method, share, heals in wanted
        if (method, share, True) not in done and (heals or (method, share, False) not in done)
    ]
    if not missing:
        return
    cuts = Cuts(adapter, arguments)
    if any(method not in (FULL, BASE, DIRECT) for method, _, _ in missing):
        say(f"{key['adapter']}: scored in {cuts.score():.0f} s")
    for method, share, heals in missing:
        row = {**key, "rank": max(site.rank for site in cuts.folder.sites), "method": method, "share": share}
        with tempfile.TemporaryDirectory() as place:
            row |= _measured(cuts, method, share, Path(place), heals)
        what = ", ".join(f"{name} {mean_loss(row[name]):.4f}" for name in ("loss", "healed") if name in row)
        say(f"{key['adapter']}: {method} at {share:.1%}: {what or row['skipped']}")
        with arguments.out.open("a", encoding="utf-8") as file:
            file.write(
                json.dumps(
                    row | {"steps": arguments.steps, "heal_from": arguments.heal_from, "measured_on": measured_on()}
                )
                + "\n"
            )


def _measured(cuts: Cuts, method: str, share: float, place: Path, heals: bool) -> Row:
    """Losses before and after healing, size and seconds; the reason where there is no such adapter."""
    start, smaller = time.perf_counter(), place / "cut"
    try:
        if method in (FULL, BASE, DIRECT):
            shutil.copytree(cuts.folder.path, smaller)
        else:
            cuts.cut(method, share, smaller)
    except (BudgetError, MeasureError) as error:
        return {"skipped": str(error)}
    folder = read_adapter(smaller)
    row: Row = {"n_parameters": sum(site.n_parameters for site in folder.sites)}
    row["n_bytes"] = folder.weights.stat().st_size
    loaded = cuts.put(folder)
    if method == BASE:
        with Parts(tuple(loaded.sites)).gated(torch.zeros(len(Parts(tuple(loaded.sites))))):
            return row | {"loss": cuts.losses(loaded)}
    row["loss"] = cuts.losses(loaded)
    if heals:
        row["healed"] = cuts.losses(cuts.heal(smaller))
    return row | {"seconds": time.perf_counter() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(required=True)
    running = commands.add_parser("run", help="cut, measure, heal, measure")
    running.set_defaults(command=run)
    running.add_argument("--task", required=True, help="name of the model and task, for the report")
    running.add_argument("--adapters", nargs="*", default=[], help="adapter folders, one per training seed")
    running.add_argument("--direct", nargs="*", default=[], help="adapters trained directly at a small rank")
    for name in ("train", "dev", "test"):
        running.add_argument(f"--{name}", required=True, help=f"{name} examples")
    running.add_argument("--model", help="base model, where it is not the one that the adapter names")
    running.add_argument("--gguf-file", help="name of the GGUF file inside the --model folder")
    running.add_argument("--shares", nargs="+", type=float, default=SHARES, help="of the parameters, 0..1")
    running.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS, help="to cut by")
    running.add_argument("--healed", nargs="*", default=[], help="what is healed too: SHARE:METHOD,METHOD ...")
    running.add_argument("--n-score", type=int, default=32, help="examples of --dev to score on")
    running.add_argument("--n-test", type=int, default=256, help="examples of --test")
    running.add_argument("--points", type=int, default=4, help="of the path of credit")
    running.add_argument("--steps", type=int, default=30, help="of healing")
    running.add_argument("--heal-from", default="full", choices=("labels", "full"), help="what is learned in healing")
    running.add_argument("--heal-lr", type=float, default=2e-4, help="peak learning rate of healing")
    running.add_argument("--precision", default="auto", help="of healing")
    running.add_argument("--batch-size", type=int, default=8, help="examples per forward pass")
    running.add_argument("--heal-batch-size", type=int, default=8, help="examples per step of healing")
    running.add_argument("--out", type=Path, required=True, help="JSON lines; rows are appended")
    reporting = commands.add_parser("report", help="print the table")
    reporting.set_defaults(command=report)
    drawing = commands.add_parser("figure", help="draw it, as PNG or SVG (needs kaleido and a browser)")
    drawing.set_defaults(command=figure)
    drawing.add_argument("--out", required=True, help="the file")
    drawing.add_argument("--lowest", type=float, default=60, help="where the axis of the gain begins, in per cent")
    drawing.add_argument("--titles", type=json.loads, default={}, help="names of the tasks, as a JSON object")
    for one in (reporting, drawing):
        one.add_argument("results", type=Path, nargs="+")
    arguments = parser.parse_args()
    arguments.command(arguments)


if __name__ == "__main__":
    main()
