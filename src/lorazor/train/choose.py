"""A selection run: the warm-up alone. It ends with a choice, not with a cut.

Nothing of the model changes but the numbers in A and B, so that any way of training that can run LoRA can run it; the
survivors are trained by a second, ordinary run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from lorazor.train.outcome import WarmupOutcome
from lorazor.train.warmup import Warmup


class ChooseSites(Warmup):
    """Choose sites in `settings.select_steps` steps, then end the training.

    The Trainer's `max_steps` may be that of the whole training, so that its learning rate is the whole training's.
    When it ends, the gates are multiplied into B, on all sites: what is saved then is the adapter as it was trained.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin the warm-up. The learning rate is planned; what counts steps from here on counts its own."""
        super().on_train_begin(args, state, control, **kwargs)
        state.max_steps = self.settings.select_steps

    def finish(
        self,
        outcome: WarmupOutcome,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: TrainerState,
        control: TrainerControl,
    ) -> None:
        """Note the choice, and stop; there is no checkpoint of this step to go on from.

        The gates go into B as they were learned, on all sites: what is saved then can be cut by this choice or another.
        """
        outcome.gated.fold_()
        outcome.gated.gates.keep_only(outcome.is_kept)
        control.should_training_stop = True
        control.should_save = control.should_evaluate = False
        kept = [site for site, stays in zip(outcome.gated.sites, outcome.is_kept.tolist(), strict=True) if stays]
        self.selection = outcome.selection(kept, self.seed)
