"""Training steps that benchmarks time: a base model, stock LoRA on it, and steps of several trainings in turn."""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _machine import say
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lorazor.adapter.load import load
from lorazor.settings import ModelSettings

LARGEST_GRADIENT_NORM = 1.0
LEARNING_RATE = 1e-3
SMOLLM2_SHAPE = {  # SmolLM2-135M
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}

Step = Callable[[], float]
"""One step of a training on its next batch; gives the loss."""


def add_training_arguments(parser: argparse.ArgumentParser, rows: int, tokens: int, rounds: int) -> None:
    """The options of every benchmark that times steps."""
    parser.add_argument("--model", help="base model: hub id or folder; by default a random Llama")
    parser.add_argument("--gguf-file", help="name of the GGUF file inside the --model folder")
    parser.add_argument("--rank", type=int, default=8, help="r of every site")
    parser.add_argument("--batch-size", type=int, default=rows, help="rows of a step")
    parser.add_argument("--tokens", type=int, default=tokens, help="tokens of a row")
    parser.add_argument("--rounds", type=int, default=rounds, help="steps of every variant that are timed")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything that is random")
    parser.add_argument("--out", type=Path, help="also write the result to this file")


def load_base(arguments: argparse.Namespace, shape: Mapping[str, Any]) -> PreTrainedModel:
    """The model that the options name, or a random Llama of `shape`; in float32 on the CPU, frozen."""
    if arguments.model:
        settings = ModelSettings(arguments.model, arguments.gguf_file, dtype="float32", device_map="cpu")
        model = load(settings=settings).model
    else:
        torch.manual_seed(arguments.seed)
        model = LlamaForCausalLM(LlamaConfig(**shape))
    return model.train().requires_grad_(False)


def describe_base(base: PreTrainedModel, arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "model": arguments.model or "random Llama",
        "hidden_size": base.config.hidden_size,
        "n_layers": base.config.num_hidden_layers,
        "batch_shape": [arguments.batch_size, arguments.tokens],
    }


def sharing_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the modules that holds the same weights, so that many variants fit into memory."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def stock_lora(base: PreTrainedModel, arguments: argparse.Namespace, dropout: float = 0.0) -> PeftModel:
    """PEFT's own LoRA on all linear maps of a copy of the base, the same for the same options."""
    torch.manual_seed(arguments.seed)
    config = LoraConfig(
        r=arguments.rank,
        lora_alpha=2 * arguments.rank,
        lora_dropout=dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(sharing_weights(base), config).train()  # pyright: ignore[reportReturnType]


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def make_optimizer(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(trained_parameters(model), lr=LEARNING_RATE)


def random_batches(model: PreTrainedModel, arguments: argparse.Namespace) -> Iterator[dict[str, Tensor]]:
    """Rows of random tokens without end, the same for the same seed: what is in them costs no time."""
    generator = torch.Generator().manual_seed(arguments.seed)
    shape = (arguments.batch_size, arguments.tokens)
    while True:
        tokens = torch.randint(model.config.vocab_size, shape, generator=generator)
        yield {"input_ids": tokens, "labels": tokens}


def backward(model: nn.Module, batch: dict[str, Tensor]) -> float:
    """Forward and backward pass, and clipping as the Trainer does it."""
    loss = model(**batch).loss
    loss.backward()
    nn.utils.clip_grad_norm_(trained_parameters(model), LARGEST_GRADIENT_NORM)
    return loss.item()


def stock_step(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterator[dict[str, Tensor]]) -> Step:
    def step() -> float:
        loss = backward(model, next(batches))
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


@contextmanager
def counting_saved_bytes(model: nn.Module) -> Iterator[Callable[[], int]]:
    """Count what autograd keeps for backward passes inside the block, weights left out."""
    held = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, torch.UntypedStorage] = {}  # the storages stay alive, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            saved[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(storage.nbytes() for storage in saved.values())


def saved_bytes(model: PeftModel, batch: dict[str, Tensor]) -> int:
    """What autograd keeps of a forward pass for the backward pass."""
    with counting_saved_bytes(model) as count:
        model(**batch)
    return count()


def time_in_turn(steps: Mapping[str, Step], n_rounds: int) -> dict[str, dict[str, list[float]]]:
    """Time a step of each in every round, forwards and backwards in turn, so that disturbances hit all alike.

    Returns:
        "seconds" on the clock and "processor_seconds" of this process by variant, one of each round.
    """
    for step in steps.values():  # warm up: caches, and the optimizer's state
        step()
    found = {kind: {name: [] for name in steps} for kind in ("seconds", "processor_seconds")}
    for index in range(n_rounds):
        for name in list(steps) if index % 2 == 0 else list(reversed(steps)):
            start, processor_start = time.perf_counter(), time.process_time()
            steps[name]()
            found["seconds"][name].append(time.perf_counter() - start)
            found["processor_seconds"][name].append(time.process_time() - processor_start)
        times = ", ".join(f"{name} {values[-1]:.2f} s" for name, values in found["seconds"].items())
        say(f"round {index + 1} of {n_rounds}: {times}")
    return found


def compare_times(found: dict[str, dict[str, list[float]]], competitor: str) -> dict[str, Any]:
    """Medians of the seconds, and of every round's ratio to the competitor."""
    document: dict[str, Any] = {"n_threads": torch.get_num_threads()}
    for kind, seconds in found.items():
        ratios = {
            name: [one / other for one, other in zip(values, seconds[competitor], strict=True)]
            for name, values in seconds.items()
        }
        document[f"median_{kind}"] = {name: median(values) for name, values in seconds.items()}
        document[f"median_ratio_of_{kind}"] = {name: median(values) for name, values in ratios.items()}
        document[f"{kind}_by_round"] = seconds
    return document
