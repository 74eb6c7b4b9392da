"""A budget of 0.5 to 0.7 of the step of LoRA on all sites is met within 10 %, in time and in peak memory.

The cost model of `lorazor select --step-time` and `--memory` is fitted to a few probing steps, and sites are chosen
under several budgets by random scores. Then each choice is measured again by steps of the Trainer, as the command does
it after its choice; and by stock LoRA (PEFT, all linear maps) cut to the choice, in a plain loop that knows nothing of
the probing. Judged are the Trainer's ratios to all sites, in processor time (so that what else the machine does counts
less) and in bytes of the tensors that live in a step. The plain loop lacks what the Trainer adds to every step.

    python benchmarks/budgets_are_met.py [--model FOLDER [--gguf-file NAME]]     default: a random Llama
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _machine import record, say
from _models import byte_tokenizer
from _training import (
    add_training_arguments,
    compare_times,
    describe_base,
    load_base,
    make_optimizer,
    stock_lora,
    stock_step,
    time_in_turn,
)
from torch import Tensor
from transformers import PreTrainedModel

from lorazor.adapter.load import Loaded
from lorazor.adapter.sites import find_sites
from lorazor.data.batches import IGNORED
from lorazor.measure.peak import counting_peak
from lorazor.select.scores import control_scores
from lorazor.settings import FitSettings
from lorazor.train.answers import TARGETS, TrainingRow
from lorazor.train.disconnect import disconnect_
from lorazor.train.probing import Probing

BUDGETS = (0.5, 0.6, 0.7)
LIMIT = 0.1
SHAPE = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_training_arguments(parser, rows=4, tokens=84, rounds=5)
    arguments = parser.parse_args()
    base = load_base(arguments, SHAPE)
    found: dict[str, Any] = {}
    for unit in ("seconds", "bytes"):
        say(f"probing {unit}")
        found[unit] = budgets_of(unit, base, arguments)
        say(f"{unit}: {found[unit]}")
    failures = [
        f"{unit}, budget {budget}: {one['predicted']:.3f} predicted, {one['measured']:.3f} measured."
        for unit, by_budget in found.items()
        for budget, one in by_budget.items()
        if abs(one["predicted"] / one["measured"] - 1) > LIMIT
    ]
    record(describe_base(base, arguments) | {"limit": LIMIT, "holds": not failures, **found}, arguments.out)
    if failures:
        raise SystemExit(" ".join(failures))


def budgets_of(unit: Any, base: PreTrainedModel, arguments: argparse.Namespace) -> dict[str, Any]:
    """By budget, the share of the cost of all sites that was predicted, and the one that a plain loop has."""
    model, batch = stock_lora(base, arguments), one_batch(base, arguments)
    tokenizer = byte_tokenizer()
    loaded = Loaded(base, tokenizer, lambda: tokenizer, "causal", [])
    rows: list[TrainingRow] = []
    for ids in batch["input_ids"].tolist():  # targets stand where they are predicted
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), TARGETS: [*ids[1:], IGNORED]})
    fit = FitSettings(steps=30, precision="float32", seed=arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        probing = Probing(model, loaded, rows, Path(folder), fit, arguments.batch_size, time.process_time)
        costs, probes, measured = probing.costs(unit)
    misfit = max(abs(costs.of(probe) / value - 1) for probe, value in zip(probes, measured, strict=True))
    say(f"largest misfit of the {len(probes)} probes: {misfit:.3f}")
    scores = control_scores(find_sites(model), arguments.seed)["random"]
    choices = {"all": [True] * len(scores)}
    for budget in BUDGETS:
        if costs.least <= budget * measured[0]:
            choices[str(budget)] = costs.choose(scores, budget * measured[0]).tolist()
    with tempfile.TemporaryDirectory() as folder:
        again = dataclasses.replace(probing, folder=Path(folder)).measure(unit, list(choices.values()))
    trainer = {name: value / again[0] for name, value in zip(choices, again, strict=True)}
    steps = {name: Variant(base, choice, batch, arguments) for name, choice in choices.items()}
    if unit == "bytes":
        peaks = {name: one.peak() for name, one in steps.items()}
        ratios = {name: {"in_a_plain_loop": value / peaks["all"]} for name, value in peaks.items()}
    else:
        times = compare_times(time_in_turn({name: one.step for name, one in steps.items()}, arguments.rounds), "all")
        ratios = {
            name: {
                "in_a_plain_loop": times["median_ratio_of_processor_seconds"][name],
                "on_the_clock": times["median_ratio_of_seconds"][name],
            }
            for name in choices
        }
    return {
        name: {
            "n_sites": sum(choice),
            "predicted": costs.of(choice) / measured[0],
            "measured": trainer[name],
            **ratios[name],
        }
        for name, choice in choices.items()
    }


def one_batch(base: PreTrainedModel, arguments: argparse.Namespace) -> dict[str, Tensor]:
    """Random tokens, every one of which is learned."""
    generator = torch.Generator().manual_seed(arguments.seed)
    shape = (arguments.batch_size, arguments.tokens)
    tokens = torch.randint(base.config.vocab_size, shape, generator=generator)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}


class Variant:
    """Stock LoRA, cut to some of its sites."""

    def __init__(
        self, base: PreTrainedModel, choice: list[bool], batch: dict[str, Tensor], arguments: argparse.Namespace
    ) -> None:
        self.model = stock_lora(base, arguments)
        disconnect_(self.model, find_sites(self.model), choice)
        self.optimizer = make_optimizer(self.model)
        self.step = stock_step(self.model, self.optimizer, self.endless(batch))

    def endless(self, batch: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        while True:
            yield batch

    def peak(self) -> int:
        """Bytes of weights and optimizer state, and the most that a step adds to them."""
        self.step()
        state = [one for values in self.optimizer.state.values() for one in values.values()]
        with counting_peak(self.model) as peak:
            self.step()
            return peak() + sum(one.nbytes for one in state)


if __name__ == "__main__":
    main()
