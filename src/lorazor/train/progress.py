"""One quiet bar for a training, with the time that is left, in the place of the Trainer's bars and dictionaries."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import Progress
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class StepBar(TrainerCallback):
    """A bar on stderr that counts optimizer steps and shows the last loss; in the main process only."""

    def __init__(self, label: str) -> None:
        """Args: what is trained, in front of the bar."""
        self.label = label
        self._bar: Progress | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin where the training begins: a resumed one has taken steps already."""
        if state.is_world_process_zero:
            self._bar = Progress(console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task(self.label, total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count the step."""
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the loss."""
        if self._bar is not None and logs is not None and "loss" in logs:
            self._bar.update(self._task, description=f"{self.label}, loss {float(logs['loss']):.3f}")

    def close(self) -> None:
        """Take the bar down, also where the training was interrupted."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
