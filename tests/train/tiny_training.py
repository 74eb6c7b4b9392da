"""Tiny trainings: a Trainer whose batches are known, and the same training written out by hand in torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from tests.tiny_models import tiny_inputs, tiny_model, tiny_peft_model

N_LAYERS = 2
N_SITES = 7 * N_LAYERS
LEARNING_RATE = 5e-3


def tiny_llama(rank: int = 2, **lora_kwargs: Any) -> PeftModel:
    """A two-layer Llama with LoRA on its 14 projections, B random."""
    return tiny_peft_model("llama", N_LAYERS, rank, **lora_kwargs).train()


def rows(n_rows: int = 64, seed: int = 0) -> list[dict[str, list[int]]]:
    """Rows of 4 to 9 tokens, the first two of each without a label: batches differ in their number of labels."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 10, (n_rows,), generator=generator).tolist()
    tokens = [torch.randint(3, 64, (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": row, "labels": [-100, -100, *row[2:]]} for row in tokens]


@dataclass
class Collator:
    """Pads, and remembers every batch that it made."""

    batches: list[dict[str, Tensor]] = field(default_factory=list)

    def __call__(self, examples: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        length = max(len(example["input_ids"]) for example in examples)
        padding = {"input_ids": 0, "labels": -100}
        batch = {
            name: torch.tensor([example[name] + [value] * (length - len(example[name])) for example in examples])
            for name, value in padding.items()
        }
        batch["attention_mask"] = (batch["input_ids"] != 0).long()
        self.batches.append({name: tensor.clone() for name, tensor in batch.items()})
        return batch


def arguments(folder: Path, steps: int, kind: Callable[..., Any] = TrainingArguments, **kwargs: Any) -> Any:
    """Arguments that leave nothing to the machine."""
    settings = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": 3,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "linear",
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "use_cpu": True,
    }
    return kind(**{**settings, **kwargs})


def make_trainer(
    folder: Path, model: nn.Module, *callbacks: Any, steps: int = 6, eval_dataset: Any = None, **kwargs: Any
) -> Trainer:
    """A Trainer on `rows()`; `kwargs` go to its arguments."""
    return Trainer(
        model=model,
        args=arguments(folder, steps, **kwargs),
        train_dataset=rows(),
        eval_dataset=eval_dataset,
        data_collator=Collator(),
        callbacks=list(callbacks),
    )


@torch.no_grad()
def logits_of(model: nn.Module) -> Tensor:
    """Logits of a fixed batch, in eval mode; the model's mode stays."""
    was_training = model.training
    logits = model.eval()(**tiny_inputs("llama")).logits
    model.train(was_training)
    return logits


class Watch(TrainerCallback):
    """Looks at the model at the events named, and keeps what it saw, in order."""

    def __init__(self, looks: dict[str, Callable[[nn.Module], Any]]) -> None:
        self.seen: list[Any] = []
        for event, look in looks.items():
            setattr(self, event, lambda *_, look=look, model=None, **__: self.seen.append(look(model)))


class GatedLinear(nn.Module):
    """W x + w_i s B A x, as the equation says."""

    def __init__(self, linear: nn.Linear, A: Tensor, B: Tensor, scaling: float) -> None:
        super().__init__()
        self.linear, self.scaling = linear, scaling
        self.A, self.B = nn.Parameter(A.clone()), nn.Parameter(B.clone())
        self.gate: Tensor | float = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.gate * self.scaling * (x @ self.A.T @ self.B.T)


def train_by_hand(
    start: PeftModel, batches: list[dict[str, Tensor]], budgets: list[int], accumulation: int, gate_lr: float
) -> Iterator[Tensor]:
    """WeightLoRA in plain torch: AdamW on A and B, gradient descent and top-k magnitude on the gates.

    Yields:
        The gates after each step, (n_sites,), by the names of the sites.
    """
    tensors = start.state_dict()
    model = tiny_model("llama", N_LAYERS).train().requires_grad_(False)
    layers = []
    for name, module in sorted(model.named_modules(), key=lambda item: item[0]):  # the one order of sites
        key = f"base_model.model.{name}"
        if f"{key}.lora_A.default.weight" in tensors:
            factors = (tensors[f"{key}.lora_{part}.default.weight"] for part in "AB")
            layers.append(GatedLinear(module, *factors, scaling=2.0))
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layers[-1])
    factors = [factor for layer in layers for factor in (layer.A, layer.B)]
    optimizer = torch.optim.AdamW(factors, lr=LEARNING_RATE, weight_decay=0.1)
    gates = torch.ones(len(layers), requires_grad=True)
    for step, budget in enumerate(budgets):
        micro = batches[step * accumulation : (step + 1) * accumulation]
        n_labels = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in micro)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - step / len(budgets))
        for batch in micro:
            for layer, gate in zip(layers, gates, strict=True):
                layer.gate = gate
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            loss = nn.functional.cross_entropy(
                logits[:, :-1].reshape(-1, logits.shape[-1]), batch["labels"][:, 1:].reshape(-1), reduction="sum"
            )
            (loss / n_labels).backward()
        nn.utils.clip_grad_norm_(factors, 0.5)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            gates -= gate_lr * gates.grad
            gates[gates.abs().argsort(descending=True)[budget:]] = 0
        gates.grad = None
        yield gates.detach().clone()
