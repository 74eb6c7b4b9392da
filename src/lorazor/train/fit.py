"""One ordinary training run of a PEFT model, for every task: transformers' Trainer, on the loss that is measured."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from rich.progress import Progress
from torch import nn
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import integration_utils

from lorazor.adapter.head import note_head
from lorazor.adapter.load import Loaded
from lorazor.adapter.prune import fold_alphas_
from lorazor.adapter.quantization import note_form
from lorazor.errors import MeasureError, SettingsError
from lorazor.measure.peak import count_anew
from lorazor.measure.sharding import is_main_process, this_process
from lorazor.settings import FitSettings, LoraSettings
from lorazor.train.answers import AnswerTrainer, PadRight, TrainingRow, training_order
from lorazor.train.resume import MarkComplete, last_complete_checkpoint

HOW_TO_CONVERGE = "The training diverged: pass a lower learning rate, or let it rise over more steps."


@dataclass(frozen=True)
class Fitted:
    """What a run came to.

    Attributes:
        n_parameters: trainable parameters, a trained head included.
        loss: mean loss of the last logged steps: nats per answer token, per text or per question.
        seconds: time spent in the trainer, without what an interrupted run had spent before.
        step_seconds: time of a step, the median.
        peak_bytes: of memory, by CUDA's allocator; None on other devices.
        log: what the trainer logged, one entry per logging step.
    """

    n_parameters: int
    loss: float
    seconds: float
    step_seconds: float
    peak_bytes: int | None
    log: list[dict[str, Any]]


@dataclass(eq=False)
class CountSteps(TrainerCallback):
    """Shows optimizer steps and the last loss on a bar, and counts the epochs of the data that they read.

    The Trainer counts rounds through the rows of one run, in their order.

    Attributes:
        bar: in the place of the Trainer's bars and dictionaries.
        label: what is trained, in front of the bar.
        start: steps that the training took before this run.
        epochs_per_step: the share of the data that a step reads.
        seconds: of each step of this run.
        peak_bytes: of memory in this run, by CUDA's allocator.
    """

    bar: Progress
    label: str
    start: int
    epochs_per_step: float
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin where the training begins: a resumed one has taken steps already.

        After the callbacks that have the run end sooner than the learning rate is planned for.
        """
        if args.device.type == "cuda":
            count_anew(args.device)
        self.task = self.bar.add_task(self.label, total=state.max_steps, completed=state.global_step)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count the step, before it is logged."""
        self.seconds.append(time.perf_counter() - self._start)
        if args.device.type == "cuda":
            self.peak_bytes = torch.cuda.max_memory_allocated(args.device)
        state.epoch = (self.start + state.global_step) * self.epochs_per_step
        self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Show the loss.

        Raises:
            MeasureError: it is not a number.
        """
        if "loss" not in kwargs["logs"]:
            return
        if not math.isfinite(loss := float(kwargs["logs"]["loss"])):
            raise MeasureError(f"The loss of step {self.start + state.global_step} is {loss}. {HOW_TO_CONVERGE}")
        self.bar.update(self.task, description=f"{self.label}, loss {loss:.3f}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at what came out: the last loss is that before the last step."""
        check_is_finite(kwargs["model"])


def fit(
    model: PeftModel | PreTrainedModel,
    loaded: Loaded,
    rows: Sequence[TrainingRow],
    folder: Path,
    training: FitSettings,
    batch_size: int,
    span: range | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    resume: bool = False,
    save_to: Path | None = None,
    report_to: Sequence[str] = (),
    label: str = "training",
    teacher: PreTrainedModel | None = None,
    has_dropout: bool = True,
) -> Fitted:
    """Take some steps of a training, or all of them.

    Steps of one training see the same batches, and the same learning rates, whether it is one run or two.

    Args:
        model: to train: in PEFT's wrapper, or all of it.
        loaded: its tokenizer and task.
        rows: all rows of the data.
        folder: for checkpoints.
        training: of the whole training.
        batch_size: rows of an optimizer step, over all processes.
        span: the steps to take, all by default; from 0 to an early end it needs a callback that ends it: `ChooseSites`.
        callbacks: for the Trainer.
        resume: go on from the last complete checkpoint in `folder`, if there is one.
        save_to: folder for an adapter and the tokenizer; they appear there whole when the run has ended.
        report_to: trackers for the Trainer, from `reporters`.
        label: text of the progress bar on stderr.
        teacher: what to learn from in place of the answers, see `AnswerTrainer`.
        has_dropout: whether the model drops out. Without it transformers recomputes no activations: see `checkpointed`.
    Raises:
        SettingsError, MeasureError: a batch that processes cannot share; a training that diverged.
    """
    span = range(training.steps) if span is None else span
    order = training_order(len(rows), span.stop * batch_size, training.seed)[span.start * batch_size :]
    bar = Progress(console=Console(stderr=True), disable=not is_main_process())
    steps = CountSteps(bar, label, span.start, batch_size / len(rows))
    trainer = AnswerTrainer(
        model,
        training_arguments(folder, training, batch_size, span, report_to),
        PadRight(loaded.tokenizer),
        [rows[place] for place in order],  # pyright: ignore[reportArgumentType]
        processing_class=loaded.tokenizer,
        callbacks=[*callbacks, steps, MarkComplete()],
    )
    trainer.teacher, trainer.has_dropout = teacher, has_dropout
    trainer.remove_callback(PrinterCallback)  # the bar says it
    with bar:
        result = trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder) if resume else None)
    if save_to is not None:
        _save(trainer, folder, save_to, loaded)
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    loss = log[-1]["loss"] if log else result.metrics["train_loss"]  # the mean of a run too short to be logged
    seconds = result.metrics["train_runtime"]
    return Fitted(_n_trained(model), loss, seconds, median(steps.seconds or [0.0]), steps.peak_bytes, log)


def check_is_finite(model: nn.Module) -> None:
    """Refuse trained weights that are not numbers.

    Raises:
        MeasureError: which are not.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):
            raise MeasureError(f"{name!r} holds what is not a number after the training. {HOW_TO_CONVERGE}")


def _n_trained(model: PeftModel | PreTrainedModel) -> int:
    return model.get_nb_trainable_parameters()[0] if isinstance(model, PeftModel) else model.num_parameters(True)


def _save(trainer: Trainer, folder: Path, target: Path, loaded: Loaded) -> None:
    """Let the Trainer write the adapter, as it does under any way of sharing a model, then put it in its place.

    The adapter's config comes last: a folder that has one is whole.
    """
    written = folder / "saved"
    trainer.save_model(str(written))
    this_process().wait_for_everyone()
    if not this_process().is_main_process:
        return
    fold_alphas_(written)
    note_form(written, loaded.model.config)
    if loaded.task == "classification":
        note_head(written, loaded.model.config)
    (written / "training_args.bin").unlink(missing_ok=True)  # a pickle that no one needs
    # safetensors makes its files readable for their owner only
    shutil.copymode(written / "adapter_config.json", written / "adapter_model.safetensors")
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(written.iterdir(), key=lambda path: path.name == "adapter_config.json"):
        path.replace(target / path.name)
    written.rmdir()


def check_training(lora: LoraSettings, training: FitSettings, batch_size: int) -> None:
    """Refuse settings that cannot work, before anything is loaded.

    Raises:
        SettingsError: a setting is out of range.
    """
    numbers = {**vars(lora), **vars(training), "batch_size": batch_size}
    for name in ("rank", "alpha", "steps", "learning_rate", "save_steps", "accumulation", "batch_size"):
        if not numbers[name] > 0:
            raise SettingsError(f"{name}={numbers[name]} must be above 0.")
    if not 0 <= lora.dropout < 1:
        raise SettingsError(f"dropout={lora.dropout} must be at least 0 and below 1.")
    if batch_size % training.accumulation:
        raise SettingsError(
            f"accumulation={training.accumulation} passes cannot share the batch_size={batch_size} examples of a step. "
            f"Pass a divisor of {batch_size}."
        )
    if training.rise_steps < 0:
        raise SettingsError(f"rise_steps={training.rise_steps} must be at least 0.")


def reporters(report_to: str) -> list[str]:
    """The trackers in `report_to`, by the names that transformers gives them, for its `TrainingArguments`.

    Args:
        report_to: names separated by commas, or `none`.
    Raises:
        SettingsError: a name that transformers does not know, or whose package is not installed.
    """
    names = [name.strip() for name in report_to.split(",") if name.strip()]
    if names in ([], ["none"]):
        return []
    known = integration_utils.INTEGRATION_TO_CALLBACK
    for name in names:
        if name not in known:
            raise SettingsError(
                f"report_to={name!r} is unknown to transformers. Pass none, or some of {', '.join(sorted(known))}."
            )
        # flyte cannot be found this way, and says so itself
        if name not in integration_utils.get_available_reporting_integrations() and name != "flyte":
            raise SettingsError(f"report_to={name!r} needs a package that is not installed. Run: pip install {name}")
    return names


def training_arguments(
    folder: Path, training: FitSettings, batch_size: int, span: range, report_to: Sequence[str]
) -> TrainingArguments:
    """What the Trainer is told; see `fit`.

    Raises:
        SettingsError: a batch that cannot be shared among the processes.
    """
    # the second of two runs goes on down the line that leads from the peak to 0 at the end
    peak, rise = training.learning_rate, training.rise_steps
    if span.start > 0:
        peak, rise = peak * (training.steps - span.start) / (training.steps - rise), 0
    has_bfloat16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=training.steps - span.start,
        learning_rate=peak,
        lr_scheduler_type="linear",
        warmup_steps=rise,
        weight_decay=training.weight_decay,
        # on a CPU without bfloat16 units it costs a factor of ten
        bf16=training.precision == "bfloat16" or (training.precision == "auto" and has_bfloat16),
        gradient_accumulation_steps=training.accumulation,
        activation_checkpointing=training.gradient_checkpointing,
        train_sampling_strategy="sequential",  # the rows are shuffled already
        remove_unused_columns=False,  # there are none
        save_strategy="steps",
        save_steps=training.save_steps,
        save_total_limit=2,  # a newer one may be half written when the process is killed
        logging_nan_inf_filter=False,  # which logs them as 0
        logging_steps=max(1, training.steps // 30),
        report_to=list(report_to),
        seed=training.seed,
        use_cpu=not torch.accelerator.is_available(),
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    args._n_gpu = min(args.n_gpu, 1)  # the Trainer would put a batch on every GPU that it sees
    n_passes = args.world_size * training.accumulation
    if batch_size % n_passes:
        raise SettingsError(
            f"batch_size={batch_size} examples of a step cannot be shared among {args.world_size} processes in "
            f"{training.accumulation} passes each. Pass a multiple of {n_passes}."
        )
    args.per_device_train_batch_size = batch_size // n_passes
    return args
