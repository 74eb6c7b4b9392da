"""Decoding several boundaries in one batch, with gates per row, gives the tokens of separate runs in less time.

Both ways decode the same prompts greedily in float32, in turn, so that a machine that slows down slows both; which goes
first alternates. In a separate run every row has the same gates: the sites beyond its boundary are silenced. Tokens are
compared up to the first end token, not texts. Two near-equal logits may still swap places, because a matrix product of
another size rounds in another order; every answer that differs is listed with the place where it does.

    python benchmarks/row_gates_are_exact_and_faster.py --model FOLDER [--gguf-file NAME] [--adapter FOLDER] --data FILE
    python benchmarks/row_gates_are_exact_and_faster.py --tiny
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _machine import record, say
from _models import add_model_arguments, load_model, read_data
from torch import Tensor

from lorazor.adapter.load import Loaded
from lorazor.adapter.parts import Parts
from lorazor.adapter.sites import choose_stack, stack_sizes
from lorazor.data.batches import Batch, make_prompt_batches
from lorazor.measure.generation import generate_batch
from lorazor.measure.meter import boundary_gates
from lorazor.select.boundary import parse_boundaries

Answers = dict[tuple[int, int], list[int]]
"""Tokens up to the first end token, by example and boundary."""


class TokenNumbers:
    """A tokenizer that decodes tokens to their numbers, so that not a single one is lost in a text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def batch_decode(self, tokens: Tensor, skip_special_tokens: bool) -> list[str]:
        return [" ".join(map(str, row)) for row in tokens.tolist()]


def main() -> None:
    arguments = _arguments()
    loaded = load_model(arguments)
    boundaries = choose_boundaries(loaded, arguments.boundaries)
    n_new = arguments.max_new_tokens
    batches = make_prompt_batches(
        read_data(arguments), loaded.tokenizer, "causal", arguments.batch_size, max_new_tokens=n_new
    ).batches
    loaded = dataclasses.replace(loaded, tokenizer=TokenNumbers(loaded.tokenizer))
    ways = {"together": decode_together, "apart": decode_apart}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    answers: dict[str, Answers] = {name: {} for name in ways}
    for decode in ways.values():  # warm up
        decode(loaded, batches[0], boundaries, 2)
    for index, batch in enumerate(batches):
        for name in list(ways) if index % 2 == 0 else list(reversed(ways)):
            start = time.perf_counter()
            answers[name] |= ways[name](loaded, batch, boundaries, n_new)
            seconds[name].append(time.perf_counter() - start)
        times = ", ".join(f"{name} {seconds[name][-1]:.2f} s" for name in ways)
        say(f"batch {index + 1} of {len(batches)}: {times}")
    record(describe(answers, seconds, boundaries), arguments.out)


def decode_together(loaded: Loaded, batch: Batch, boundaries: Sequence[int], max_new_tokens: int) -> Answers:
    """All boundaries in one batch: each row has the gates of its boundary."""
    parts, stack = Parts(tuple(loaded.sites)), choose_stack(loaded.sites)
    gates = torch.stack([boundary_gates(parts, stack, boundary) for boundary in boundaries])  # (boundaries, n_parts)
    return {
        (prediction.example, boundaries[prediction.variant]): tokens_of(prediction.text, loaded)
        for prediction in generate_batch(loaded, parts, batch, gates, max_new_tokens)
    }


def decode_apart(loaded: Loaded, batch: Batch, boundaries: Sequence[int], max_new_tokens: int) -> Answers:
    """One run per boundary: all rows have the same gates."""
    answers: Answers = {}
    for boundary in boundaries:
        answers |= decode_together(loaded, batch, [boundary], max_new_tokens)
    return answers


def tokens_of(text: str, loaded: Loaded) -> list[int]:
    """The numbers up to the first end token: what follows pads the row to the longest of its batch."""
    own = loaded.model.generation_config.eos_token_id
    ends = own if isinstance(own, list) else [own if own is not None else loaded.tokenizer.eos_token_id]
    tokens = [int(number) for number in text.split()]
    end = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: end + 1]


def choose_boundaries(loaded: Loaded, text: str | None) -> list[int]:
    """Those given, or the base model, the full adapter and two boundaries in between."""
    n_layers = stack_sizes(loaded.sites)[choose_stack(loaded.sites)]
    if text is not None:
        return parse_boundaries(text, n_layers)
    return sorted({0, n_layers // 3, 2 * n_layers // 3, n_layers})


def describe(answers: dict[str, Answers], seconds: dict[str, list[float]], boundaries: Sequence[int]) -> dict[str, Any]:
    together, apart = answers["together"], answers["apart"]
    different = [
        {"example": example, "boundary": boundary, "first_difference": first_difference(tokens, together[key])}
        for key, tokens in apart.items()
        if tokens != together[key]
        for example, boundary in [key]
    ]
    totals = {name: sum(times) for name, times in seconds.items()}
    examples = {example for example, _ in apart}
    return {
        "boundaries": list(boundaries),
        "n_examples": len(examples),
        "n_answers": len(apart),
        "n_answers_equal": len(apart) - len(different),
        "n_examples_that_vary_with_the_boundary": sum(
            len({tuple(apart[example, boundary]) for boundary in boundaries}) > 1 for example in examples
        ),
        "n_tokens": sum(map(len, apart.values())),
        "different": different,
        "n_threads": torch.get_num_threads(),
        "seconds": totals,
        "seconds_by_batch": seconds,
        "times_faster": totals["apart"] / totals["together"],
    }


def first_difference(tokens: list[int], others: list[int]) -> int:
    pairs = zip(tokens, others, strict=False)
    return next((place for place, (one, other) in enumerate(pairs) if one != other), min(len(tokens), len(others)))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_model_arguments(parser, n_examples=16)
    parser.add_argument("--boundaries", help="such as 0,10,24:30; the full adapter is always among them. Default: 4")
    parser.add_argument("--max-new-tokens", type=int, default=48, help="longest answer")
    parser.add_argument("--out", type=Path, help="also write the result to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
