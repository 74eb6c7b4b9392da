"""A selection run: the warm-up alone. It ends with a choice, not with a cut.

Nothing of the model changes but the numbers in A and B, so that any way of training that can run LoRA can run it; the
survivors are trained by a second, ordinary run.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from lorazor.train.gating import GatedSites
from lorazor.train.outcome import make_selection
from lorazor.train.warmup import Warmup


class ChooseSites(Warmup):
    """Choose sites in `settings.warmup_steps` steps, then end the training.

    The Trainer's `max_steps` may be that of the whole training, so that its learning rate is the whole training's.
    When it ends, the gates are multiplied into B, on all sites: what is saved then is the adapter as it was trained.
    """

    def finish(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        gated: GatedSites,
        is_kept: list[bool],
        scores: dict[str, Tensor],
    ) -> None:
        """Fold the gates, note the choice, and stop. There is no checkpoint of this step to go on from."""
        gated.fold_()
        control.should_training_stop = True
        control.should_save = control.should_evaluate = False
        ranks = {site.name: site.rank for site, stays in zip(gated.sites, is_kept, strict=True) if stays}
        self.selection = make_selection(gated, scores[self.settings.score], ranks, self.seed)
