"""After the cut to 10 % of the sites a training step takes at most 0.90 of the time of stock LoRA on all sites.

What autograd keeps from forward to backward shrinks as well: to at most 0.70 of its bytes with dropout 0.05 in front of
A, as in WeightLoRA's scripts, and to at most 0.82 without, where the sites of q, k and v (or gate and up) share one
saved input, so that there is less to save. Time is measured without dropout, which slows stock LoRA more than the rest.

Stock LoRA (PEFT, r = 8, all linear maps) trains in turn with copies that hold the same base weights and, after a first
step, were cut in place to a tenth of their sites. By then the optimizer has state of every site, and each cut must
leave no trace of a removed one: in the model's parameters, the optimizer's groups and state, or the autograd graph that
can be reached from the loss. Optimizer state and adapter tensors must be in proportion to the parameters that stay.

The sites that stay are drawn at random, one from each of as many equal stretches of the execution order, so that they
lie evenly, with three seeds. Judged is the median over the rounds of the ratio within a round, for each seed. Two more
cuts are only reported: a backward pass ends at the lowest site, so that the last layers alone are much cheaper than any
spread of sites, and the first layers are not. Saved tensors are counted once per storage, without weights and buffers.

    python benchmarks/the_cut_saves.py [--model FOLDER [--gguf-file NAME]]     default: random, shaped as SmolLM2-135M
    python benchmarks/the_cut_saves.py --tiny
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from _machine import record, say
from _training import (
    SMOLLM2_SHAPE,
    Step,
    add_training_arguments,
    compare_times,
    describe_base,
    load_base,
    make_optimizer,
    random_batches,
    saved_bytes,
    stock_lora,
    stock_step,
    time_in_turn,
    trained_parameters,
)
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorazor.adapter.sites import LiveSite, find_sites, site_parameters
from lorazor.select.projection import budget_for_fraction, sites_for_count
from lorazor.select.scores import control_scores
from lorazor.train.disconnect import disconnect_

KEPT_FRACTION = 0.1
DROPOUT = 0.05
LIMITS = {"time_ratio": 0.90, "saved_ratio": 0.82, "saved_ratio_with_dropout": 0.70}
TINY_SHAPE = {**SMOLLM2_SHAPE, "vocab_size": 512, "hidden_size": 96, "intermediate_size": 256, "num_attention_heads": 3}

Keep = Callable[[Sequence[LiveSite]], Tensor]
"""Which sites stay, (n_sites,) bool."""


def main() -> None:
    arguments = _arguments()
    base = load_base(arguments, TINY_SHAPE if arguments.tiny else SMOLLM2_SHAPE)
    variants = {"stock": Variant(base, None, arguments)}
    for name, keep in choices(arguments.seed).items():
        say(f"cutting to {name}")
        variants[name] = Variant(base, keep, arguments)
    times = compare_times(time_in_turn({name: one.step for name, one in variants.items()}, arguments.rounds), "stock")
    found = {name: variant.describe() for name, variant in variants.items()}
    for name, one in found.items():
        one["time_ratio"] = times["median_ratio_of_seconds"][name]
        for ending in ("", "_with_dropout"):
            one[f"saved_ratio{ending}"] = one[f"saved_bytes{ending}"] / found["stock"][f"saved_bytes{ending}"]
    failures = [failure for name, one in found.items() for failure in check(name, one)]
    document = describe_base(base, arguments) | {"limits": LIMITS, "holds": not failures, "variants": found}
    record(document | times, arguments.out)
    if failures:
        raise SystemExit(" ".join(failures))


def choices(seed: int) -> dict[str, Keep]:
    """By name, what stays."""
    spread: dict[str, Keep] = {
        f"spread, seed {seed + index}": lambda sites, seed=seed + index: evenly_spread(len(sites), seed)
        for index in range(3)
    }
    return spread | {
        name.replace("-", " "): lambda sites, name=name: sites_for_count(
            control_scores(sites, seed)[name], budget_for_fraction(KEPT_FRACTION, len(sites))
        )
        for name in ("first-layers", "last-layers")
    }


def evenly_spread(n_sites: int, seed: int) -> Tensor:
    """One site at random from each of as many stretches, of nearly equal length, as sites are to stay."""
    n_kept = budget_for_fraction(KEPT_FRACTION, n_sites)
    edges = [place * n_sites // n_kept for place in range(n_kept + 1)]
    generator = torch.Generator().manual_seed(seed)
    kept = torch.zeros(n_sites, dtype=torch.bool)
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        kept[torch.randint(low, high, (), generator=generator)] = True
    return kept


class Variant:
    """A training on all sites, or on those left by a cut after the first step."""

    def __init__(self, base: PreTrainedModel, keep: Keep | None, arguments: argparse.Namespace) -> None:
        self.model = stock_lora(base, arguments, arguments.dropout)
        self.optimizer = make_optimizer(self.model)
        self.batches = random_batches(base, arguments)
        self.step: Step = stock_step(self.model, self.optimizer, self.batches)
        self.step()  # so that the optimizer has state of every site
        sites, factors = find_sites(self.model), trained_parameters(self.model)
        is_kept = [True] * len(sites) if keep is None else keep(sites).tolist()
        self.sites = disconnect_(self.model, sites, is_kept, self.optimizer) if keep else sites
        stays = {id(factor) for site in self.sites for factor in site_parameters(site.module, site.adapter)}
        self.removed = [factor for factor in factors if id(factor) not in stays]
        self.saved = {}
        for name, dropout in (("saved_bytes", 0.0), ("saved_bytes_with_dropout", DROPOUT)):
            other = stock_lora(base, arguments, dropout)
            disconnect_(other, find_sites(other), is_kept)
            self.saved[name] = saved_bytes(other, next(self.batches))

    def describe(self) -> dict[str, Any]:
        loss = self.model(**next(self.batches)).loss
        return {
            "n_sites": len(self.sites),
            "lowest_layer": min(site.layer for site in self.sites if site.layer is not None),
            "n_parameters": self.model.get_nb_trainable_parameters()[0],
            **self.saved,
            "optimizer_bytes": optimizer_bytes(self.optimizer),
            **adapter_bytes(self.model),
            "traces_of_removed_sites": traces(self.removed, self.model, self.optimizer, loss),
            "n_trained_tensors_not_in_the_graph": n_missing(self.model, loss),
        }


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of the moments; each tensor's step counter comes on top, 4 bytes."""
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum(value.nbytes for value in states if value.ndim > 0)


def adapter_bytes(model: PeftModel) -> dict[str, int]:
    """Of the tensors that PEFT saves, and of the file with its header."""
    with tempfile.TemporaryDirectory() as place:
        model.save_pretrained(place)
        path = Path(place) / "adapter_model.safetensors"
        n_tensor_bytes = sum(tensor.nbytes for tensor in load_file(path).values())
        return {"adapter_tensor_bytes": n_tensor_bytes, "adapter_file_bytes": path.stat().st_size}


def traces(
    removed: Sequence[nn.Parameter], model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor
) -> dict[str, int]:
    """How many parameters of removed sites are still found in each place."""
    gone = {id(parameter) for parameter in removed}
    places = {
        "model": [parameter for _, parameter in model.named_parameters()],
        "optimizer groups": [parameter for group in optimizer.param_groups for parameter in group["params"]],
        "optimizer state": list(optimizer.state),
        "autograd graph": leaves_of(loss),
    }
    return {place: sum(id(parameter) in gone for parameter in found) for place, found in places.items()}


def leaves_of(loss: Tensor) -> list[Tensor]:
    """The tensors into which a backward pass from the loss would accumulate a gradient."""
    leaves, seen, open_nodes = [], set(), [loss.grad_fn]
    while open_nodes:
        node = open_nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):  # AccumulateGrad
            leaves.append(node.variable)
        open_nodes += [following for following, _ in node.next_functions]
    return leaves


def n_missing(model: PeftModel, loss: Tensor) -> int:
    """Trained tensors that the walk did not find: 0, or its finding none of the removed ones says nothing."""
    found = {id(leaf) for leaf in leaves_of(loss)}
    return sum(id(parameter) not in found for parameter in trained_parameters(model))


def check(name: str, one: dict[str, Any]) -> list[str]:
    """What does not hold of a variant, a sentence each."""
    failures, n_parameters = [], one["n_parameters"]
    if one["optimizer_bytes"] != 8 * n_parameters or one["adapter_tensor_bytes"] != 4 * n_parameters:
        failures.append(f"{name}: optimizer or adapter are not in proportion to {n_parameters} parameters.")
    if any(one["traces_of_removed_sites"].values()) or one["n_trained_tensors_not_in_the_graph"]:
        failures.append(f"{name}: the model, the optimizer or the graph hold other tensors than those that stay.")
    if name.startswith("spread"):
        failures += [
            f"{name}: {what} is {one[what]:.3f}, more than {limit:.2f}."
            for what, limit in LIMITS.items()
            if one[what] > limit
        ]
    return failures


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_training_arguments(parser, rows=8, tokens=32, rounds=9)
    parser.add_argument("--dropout", type=float, default=0.0, help="in front of A, while time is measured")
    parser.add_argument("--tiny", action="store_true", help="a small random Llama, to see the script work")
    return parser.parse_args()


if __name__ == "__main__":
    main()
