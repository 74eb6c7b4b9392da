"""Training a LoRA adapter with TRL's SFTTrainer, on the answers only."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from lorazor.adapter.load import Loaded
from lorazor.data.batches import IGNORED, make_batches
from lorazor.data.examples import Example
from lorazor.errors import SettingsError
from lorazor.settings import LoraSettings, TrainSettings


@dataclass(frozen=True)
class Trained:
    """What a training run came to.

    Attributes:
        n_parameters: trainable parameters.
        n_truncated: examples whose prompt lost its start.
        loss: mean loss of the last logged steps, nats per answer token.
        seconds: time spent in the trainer.
        log: what the trainer logged, one entry per logging step.
    """

    n_parameters: int
    n_truncated: int
    loss: float
    seconds: float
    log: list[dict[str, Any]]


def train_lora(
    loaded: Loaded,
    examples: Sequence[Example],
    out: Path,
    lora: LoraSettings | None = None,
    training: TrainSettings | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
) -> Trained:
    """Train a LoRA adapter on all examples and save it, with the tokenizer, as an ordinary PEFT folder.

    Args:
        loaded: a causal base model without an adapter.
        examples: prompts with answers, or conversations; the loss counts the answers only.
        out: folder for the adapter.
        lora: shape of the adapter.
        training: steps, learning rate, seed and so on.
        batch_size: examples per optimizer step.
        max_length: tokens of prompt and answer; longer prompts lose their start.
    Raises:
        SettingsError: not a causal model, or settings out of range.
        DataError: an example without an answer, or with an answer that does not fit.
    """
    lora, training = lora or LoraSettings(), training or TrainSettings()
    _check(loaded, lora, training)
    encoding = make_batches(examples, loaded.tokenizer, "causal", batch_size=1, max_length=max_length)
    rows = {batch.indices[0]: _as_row(batch.inputs["input_ids"][0], batch.targets[0]) for batch in encoding.batches}
    trainer = SFTTrainer(
        model=loaded.model,
        args=_arguments(out, training, batch_size),
        train_dataset=Dataset.from_list([rows[index] for index in sorted(rows)]),
        processing_class=loaded.tokenizer,
        peft_config=_lora_config(lora),
    )
    parameters = trainer.accelerator.unwrap_model(trainer.model).parameters()
    n_parameters = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    with redirect_stdout(sys.stderr):  # where the trainer prints its log
        result = trainer.train()
    trainer.save_model(str(out))
    (out / "training_args.bin").unlink(missing_ok=True)  # a pickle that no one needs
    # safetensors makes its files readable for their owner only
    shutil.copymode(out / "adapter_config.json", out / "adapter_model.safetensors")
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    return Trained(n_parameters, encoding.n_truncated, log[-1]["loss"], result.metrics["train_runtime"], log)


def _check(loaded: Loaded, lora: LoraSettings, training: TrainSettings) -> None:
    if loaded.task != "causal":
        raise SettingsError(f"The base model is a {loaded.task} model; 'lorazor train' trains causal language models.")
    for name, value in (("rank", lora.rank), ("alpha", lora.alpha), ("steps", training.steps)):
        if value <= 0:
            raise SettingsError(f"{name}={value} must be above 0.")
    if not 0 <= lora.dropout < 1:
        raise SettingsError(f"dropout={lora.dropout} must be at least 0 and below 1.")


def _as_row(input_ids: torch.Tensor, targets: torch.Tensor) -> dict[str, list[int]]:
    """A pre-tokenised row of TRL; the target at position t is token t + 1."""
    completion_mask = [0, *(targets[:-1] != IGNORED).int().tolist()]
    return {"input_ids": input_ids.tolist(), "completion_mask": completion_mask}


def _lora_config(lora: LoraSettings) -> LoraConfig:
    names = lora.target_modules
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=lora.dropout,
        target_modules=names if names == "all-linear" else [name.strip() for name in names.split(",")],
        task_type="CAUSAL_LM",
    )


def _arguments(out: Path, training: TrainSettings, batch_size: int) -> SFTConfig:
    has_bfloat16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return SFTConfig(
        output_dir=str(out),
        max_steps=training.steps,
        per_device_train_batch_size=batch_size,
        learning_rate=training.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=training.warmup_steps,
        weight_decay=training.weight_decay,
        # TRL's own defaults for these two cost a factor of ten on a CPU without bfloat16 units
        bf16=training.precision == "bfloat16" or (training.precision == "auto" and has_bfloat16),
        activation_checkpointing=training.gradient_checkpointing,
        max_length=None,  # prompts were cut to length before, from the left and counted
        save_strategy="no",
        logging_steps=max(1, training.steps // 30),
        report_to=[],
        seed=training.seed,
        disable_tqdm=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
