"""A training step with learned gates, or with directions watched, costs at most 1.10 times a step of stock PEFT LoRA.

A step is forward, backward, clipping and AdamW; with gates also their gradient, step and projection, and the scores of
all sites from what the optimizer did (probe, sensitivity, loss-change), as the callback does it in each step.
Directions are watched in the last steps of a warm-up only: the step that is timed is one of these.
The published layer, which makes the dense product of every site in each forward pass, takes its steps in the same run.
All four train the same LoRA, on all linear maps of one base model, from the same start on the same batches. What is
judged is the median over the rounds of the ratio within a round, and what autograd keeps of a forward pass, which gates
raise by at most a twentieth: a number for each that A puts out.

    python benchmarks/gates_are_cheap.py [--model FOLDER [--gguf-file NAME]] [--rounds 15]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from _machine import record
from _published_weightlora import PublishedUpdate, install_published_
from _training import (
    LEARNING_RATE,
    Step,
    add_training_arguments,
    backward,
    compare_times,
    describe_base,
    load_base,
    make_optimizer,
    random_batches,
    saved_bytes,
    sharing_weights,
    stock_lora,
    stock_step,
    time_in_turn,
)
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from lorazor.adapter.sites import find_sites, site_parameters
from lorazor.select.projection import budget_for_fraction
from lorazor.select.scores import WarmupObserver
from lorazor.select.weightlora import Gates, WeightLoraSettings
from lorazor.train.gating import GatedSites
from lorazor.train.moments import DirectionMoments

LARGEST_RATIO, LARGEST_SAVED_RATIO = 1.10, 1.05
KEPT_FRACTION = 0.1
SHAPE = {
    "vocab_size": 8192,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
}

Batches = Iterator[dict[str, Tensor]]


def main() -> None:
    arguments = _arguments()
    base = load_base(arguments, SHAPE)
    stock, gated, watched = (stock_lora(base, arguments) for _ in range(3))
    steps = {
        "stock": stock_step(stock, make_optimizer(stock), random_batches(base, arguments)),
        "gated": gated_step(gated, random_batches(base, arguments), arguments.rounds + 1),
        "watched": watched_step(watched, random_batches(base, arguments)),
        "published": published_step(base, stock, random_batches(base, arguments)),
    }
    times = compare_times(time_in_turn(steps, arguments.rounds), "stock")
    ratios = {name: times["median_ratio_of_seconds"][name] for name in ("gated", "watched")}
    batch = next(random_batches(base, arguments))
    saved_ratio = max(saved_bytes(one, batch) for one in (gated, watched)) / saved_bytes(stock, batch)
    holds = max(ratios.values()) <= LARGEST_RATIO and saved_ratio <= LARGEST_SAVED_RATIO
    document = describe_base(base, arguments) | {
        "n_sites": len(find_sites(stock)),
        "largest_ratio": LARGEST_RATIO,
        "saved_ratio": saved_ratio,
        "largest_saved_ratio": LARGEST_SAVED_RATIO,
    }
    record(document | {"holds": holds} | times, arguments.out)
    if not holds:
        raise SystemExit(
            f"A gated and a watched step cost {ratios} times a stock step (at most {LARGEST_RATIO:.2f}) and keep "
            f"{saved_ratio:.3f} times its activations (at most {LARGEST_SAVED_RATIO:.2f})."
        )


def gated_step(model: PeftModel, batches: Batches, n_steps: int) -> Step:
    """A warm-up step, in the order in which the Trainer calls the callback."""
    sites = find_sites(model)
    keep = budget_for_fraction(KEPT_FRACTION, len(sites))
    settings = WeightLoraSettings(keep=keep, select_steps=n_steps, schedule="progressive", dense_steps=0)
    gated = GatedSites(sites, Gates(len(sites), settings))
    gated.attach_()
    observer = WarmupObserver(len(sites))
    optimizer = make_optimizer(model)
    factors = [site_parameters(site.module, site.adapter) for site in sites]

    def step() -> float:
        loss = backward(model, next(batches))
        gated.gates.step(gated.take_gradient())
        gated.update_()
        before = [[factor.detach().clone() for factor in site] for site in factors]
        optimizer.step()
        after = [[factor.detach() for factor in site] for site in factors]
        observer.add_step(before, after, [[factor.grad for factor in site] for site in factors])
        optimizer.zero_grad()
        return loss

    return step


def watched_step(model: PeftModel, batches: Batches) -> Step:
    """One of the last steps of a warm-up by direction."""
    moments = DirectionMoments(find_sites(model), has_rows=True)
    moments.attach_(model)
    plain = stock_step(model, make_optimizer(model), batches)

    def step() -> float:
        moments.begin_step(1.0)
        return plain()

    return step


def published_step(base: PreTrainedModel, stock: PeftModel, batches: Batches) -> Step:
    """A step of the published layer, from the start of the stock LoRA."""
    sites = find_sites(stock)
    factors = {}
    for site in sites:
        A, B = site_parameters(site.module, site.adapter)
        factors[site.name] = (A, B)
    model = sharing_weights(base)
    layers = install_published_(model, factors, sites[0].scaling)
    update = PublishedUpdate(layers, budget_for_fraction(KEPT_FRACTION, len(sites)), LEARNING_RATE)

    def step() -> float:
        loss = backward(model, next(batches))
        update.step()
        return loss

    return step


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_training_arguments(parser, rows=8, tokens=64, rounds=15)
    return parser.parse_args()


if __name__ == "__main__":
    main()
