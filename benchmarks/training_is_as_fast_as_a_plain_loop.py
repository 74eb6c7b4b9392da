"""A step of `lorazor train` takes at most 1.2 times that of a plain loop with logits at answer tokens only.

The competitor is what one would write by hand in torch: padded batches, the model's layers, its output layer on the
hidden states in front of answer tokens, cross-entropy, backward pass, clipping, AdamW. It trains the same LoRA from the
same start on the same batches, and takes its step when the Trainer has taken its own; both losses must agree. What is
judged is the median over the steps of the ratio within a step, in seconds of this process's processors, from the moment
at which the other has ended to the one at which this one has: reading of batches, schedule and log are in it.

By default a random Gemma 3 of the 270M's width and vocabulary (262,144 tokens), with fewer layers.

    python benchmarks/training_is_as_fast_as_a_plain_loop.py [--model FOLDER [--gguf-file NAME]] [--data E2E.jsonl]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _machine import record, say
from _models import byte_tokenizer, random_examples
from _training import LARGEST_GRADIENT_NORM, LEARNING_RATE, add_training_arguments, stock_lora, trained_parameters
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, TrainerCallback

from lorazor.adapter.load import Loaded, load
from lorazor.data.examples import read_examples
from lorazor.settings import FitSettings, ModelSettings
from lorazor.train.answers import TARGETS, TrainingRow, make_rows, training_order
from lorazor.train.fit import fit

LARGEST_RATIO = 1.2
LARGEST_DIFFERENCE = 1e-3
"""Of the losses of a step, in nats per answer token: sums in another order."""


class InTurn(TrainerCallback):
    """Lets the plain loop take its step after each of the Trainer's, and times both."""

    def __init__(self, plain: PlainLoop) -> None:
        self.plain = plain
        self.seconds: dict[str, list[float]] = {"lorazor": [], "plain": []}
        self.losses: dict[str, list[float]] = {"lorazor": [], "plain": []}

    def on_train_begin(self, *arguments: Any, **kwargs: Any) -> None:
        self.start = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds["lorazor"].append(time.process_time() - self.start)
        self.start = time.process_time()
        self.losses["plain"].append(self.plain.step())
        self.seconds["plain"].append(time.process_time() - self.start)
        pair = ", ".join(f"{name} {values[-1]:.2f} s" for name, values in self.seconds.items())
        say(f"step {state.global_step} of {state.max_steps}, by the processor: {pair}")
        self.start = time.process_time()

    def on_log(self, *arguments: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" in logs:
            self.losses["lorazor"].append(float(logs["loss"]))


class PlainLoop:
    """A training loop without a framework; nothing in it is lorazor's but the token ids of the rows."""

    def __init__(self, model: PeftModel, batches: Sequence[Sequence[TrainingRow]], n_steps: int) -> None:
        self.model, self.batches = model, iter(batches)
        self.optimizer = torch.optim.AdamW(trained_parameters(model), lr=LEARNING_RATE, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR
        self.schedule = schedule(self.optimizer, lambda step: 1 - step / n_steps)

    def step(self) -> float:
        rows = next(self.batches)
        tokens, mask, targets = (
            pad_sequence([torch.tensor(row[name]) for row in rows], batch_first=True, padding_value=padding)
            for name, padding in (("input_ids", 0), ("attention_mask", 0), (TARGETS, -100))
        )
        inner: Any = self.model.get_base_model()
        hidden = inner.model(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state
        is_answer = targets != -100
        loss = cross_entropy(inner.lm_head(hidden[is_answer]), targets[is_answer])
        loss.backward()
        nn.utils.clip_grad_norm_(trained_parameters(self.model), LARGEST_GRADIENT_NORM)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return loss.item()


def main() -> None:
    arguments = _arguments()
    loaded = load_base(arguments)
    n_rows = arguments.batch_size * arguments.rounds
    examples = read_examples(arguments.data, limit=n_rows) if arguments.data else random_examples(n_rows)
    rows, _ = make_rows(loaded, examples, arguments.tokens)
    ours, other = (stock_lora(loaded.model, arguments) for _ in range(2))
    order = training_order(len(rows), n_rows, arguments.seed)
    batches = [[rows[place] for place in order[start : start + arguments.batch_size]] for start in _starts(arguments)]
    turns = InTurn(PlainLoop(other, batches, arguments.rounds))
    settings = FitSettings(steps=arguments.rounds, learning_rate=LEARNING_RATE, rise_steps=0, seed=arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        fit(ours, loaded, rows, Path(folder), settings, arguments.batch_size, callbacks=[turns])
    report(turns, loaded, rows, arguments)


def report(turns: InTurn, loaded: Loaded, rows: Sequence[TrainingRow], arguments: argparse.Namespace) -> None:
    """Print the figures, without the first step, which warms up; exit with an error where the claim does not hold."""
    pairs = zip(*(values[1:] for values in turns.seconds.values()), strict=True)
    ratio = median(own / plain for own, plain in pairs)
    difference = float((Tensor(turns.losses["lorazor"]) - Tensor(turns.losses["plain"])).abs().max())
    holds = ratio <= LARGEST_RATIO and difference <= LARGEST_DIFFERENCE
    document = {
        "model": arguments.model or "random Gemma 3",
        "vocabulary": loaded.model.config.vocab_size,
        "n_layers": loaded.model.config.num_hidden_layers,
        "batch_size": arguments.batch_size,
        "mean_tokens_of_a_row": sum(len(row["input_ids"]) for row in rows) / len(rows),  # pyright: ignore
        "n_threads": torch.get_num_threads(),
        "median_processor_seconds": {name: median(values[1:]) for name, values in turns.seconds.items()},
        "median_ratio": ratio,
        "largest_ratio": LARGEST_RATIO,
        "largest_difference_of_losses": difference,
        "processor_seconds_by_step": turns.seconds,
        "holds": holds,
    }
    record(document, arguments.out)
    if not holds:
        raise SystemExit(
            f"A step takes {ratio:.3f} times that of the plain loop (at most {LARGEST_RATIO}); losses differ by "
            f"{difference:.2g} (at most {LARGEST_DIFFERENCE})."
        )


def load_base(arguments: argparse.Namespace) -> Loaded:
    """The model that the options name, or a random one; in float32 on the CPU, frozen."""
    if arguments.model:
        settings = ModelSettings(arguments.model, arguments.gguf_file, dtype="float32", device_map="cpu")
        loaded = load(settings=settings)
    else:
        torch.manual_seed(arguments.seed)
        tokenizer = byte_tokenizer()
        config = Gemma3TextConfig(
            vocab_size=262_144,
            hidden_size=640,
            intermediate_size=2048,
            num_hidden_layers=arguments.layers,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=256,
            pad_token_id=tokenizer.pad_token_id,
        )
        loaded = Loaded(Gemma3ForCausalLM(config), tokenizer, lambda: tokenizer, "causal", [])
    loaded.model.requires_grad_(False)
    return loaded


def _starts(arguments: argparse.Namespace) -> range:
    return range(0, arguments.batch_size * arguments.rounds, arguments.batch_size)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_training_arguments(parser, rows=8, tokens=128, rounds=8)
    parser.add_argument("--data", help="examples: .jsonl(.xz), .csv, .parquet; by default random ones of E2E's lengths")
    parser.add_argument("--layers", type=int, default=4, help="layers of the random model")
    return parser.parse_args()


if __name__ == "__main__":
    main()
