"""WeightLoRA in a user's own training script: a callback for transformers' Trainer and its relatives.

    trainer = Trainer(..., callbacks=[WeightLora(keep=20, select_steps=200)])

The callback owns the gates. Everything else (batches, optimizer, schedule, clipping, saving) stays the Trainer's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from lorazor.adapter.sites import LiveSite
from lorazor.select.ranks import Growth
from lorazor.select.scores import default_warmup_score
from lorazor.select.weightlora import Schedule, Unit, WeightLoraSettings
from lorazor.train.evidence import Evidence
from lorazor.train.optimizers import check_states, units_of
from lorazor.train.preconditions import check_in_place
from lorazor.train.resume import checkpoint_of, read_choice
from lorazor.train.warmup import Warmup


class WeightLora(Warmup):
    """Learn in a warm-up which LoRA sites a model needs, or which directions of them, and take the others out.

    For transformers' Trainer and Seq2SeqTrainer and TRL's SFTTrainer, in one process or under DDP. Each optimizer step
    of the warm-up is followed by a step on the gates, from the same backward passes:

        w <- H_k(w - eta * grad_w)       k: what the schedule keeps after this step

    After the warm-up the dropped sites go back to their base layers, and the gates of the others are multiplied into B.
    By direction there are no gates: the last steps of the warm-up are watched, A and B are rewritten to the basis that
    data and loss make of them, B' A' = B A, and some of its directions stay.
    Whatever the Trainer saves, at any time, is an ordinary PEFT adapter that computes what the model computes.

    Attributes:
        settings: how sites are chosen.
        seed: of the score "random", and of new directions where ranks grow.
        selection: the choice, over all sites; None until the warm-up is over. Its weights are 1: gates are folded.

    Source: Veprikov et al., arXiv:2506.02724 (WeightLoRA, WeightLoRA+); docs/methods/weightlora.md.
    """

    def __init__(
        self,
        keep: int | None = None,
        select_steps: int = 0,
        schedule: Schedule = "one-cut",
        grow: Growth | None = None,
        gate_lr: float = 5.0,
        dense_steps: int = 10,
        seed: int = 0,
        score: str | None = None,
        params: int | None = None,
        by: Unit = "site",
    ) -> None:
        """Note the settings; they are checked against model and Trainer when the training begins.

        Args:
            keep: K, sites (or directions) that stay, 1..n; with grow="served" at least.
            select_steps: T, optimizer steps of the warm-up, at least 1 and at most those of the training.
            schedule: "one-cut", "progressive" or "every-step", see `WeightLoraSettings`.
            grow: WeightLoRA+: the survivors' rank grows by what the removed sites free, "served" or as in the "paper",
                see `WeightLoraSettings`.
            gate_lr: eta, in gate per (loss per gate).
            dense_steps: steps at the start that keep every site, 0..select_steps - 1.
            seed: of the score "random", and of new directions where ranks grow.
            score: what sites are ranked by, "gate" by default; any other needs schedule="one-cut". Of directions
                "fisher" by default, "balanced", "energy" or "random".
            params: in place of `keep`, numbers in A and B that what stays may have together.
            by: "site", as in the paper, or "direction": each site keeps the directions that are worth most, and has a
                rank of its own after the warm-up.
        """
        score = score or default_warmup_score(by)
        settings = WeightLoraSettings(keep, select_steps, schedule, gate_lr, dense_steps, grow, score, params, by)
        super().__init__(settings, seed)

    def forget(self) -> None:
        """Be as new, for another training."""
        super().forget()
        self._states_are_known = False

    def check(
        self, args: TrainingArguments, model: nn.Module, sites: Sequence[LiveSite], optimizer: torch.optim.Optimizer
    ) -> None:
        """Refuse what would go wrong silently, in the warm-up or at the cut."""
        super().check(args, model, sites, optimizer)
        check_in_place(args, model, self.settings)
        units_of(optimizer)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at what the optimizer keeps, now that it has taken a step: at the cut it would be too late."""
        super().on_optimizer_step(args, state, control, **kwargs)
        if not self._states_are_known:
            check_states(kwargs["optimizer"])
            self._states_are_known = True

    def go_on_after(self, args: TrainingArguments, state: TrainerState, sites: Sequence[LiveSite]) -> None:
        """Go on from a checkpoint after the cut: the model has the survivors only."""
        self.selection = read_choice(checkpoint_of(args, state), sites, self.settings)

    def finish(self, evidence: Evidence, state: TrainerState, control: TrainerControl, **kwargs: Any) -> list[LiveSite]:
        """Cut."""
        survivors = evidence.cut_(kwargs["model"], kwargs["optimizer"])
        # An evaluation of all sites says nothing of the survivors, and its checkpoint does not fit them.
        state.best_metric = state.best_global_step = state.best_model_checkpoint = None
        return survivors
