"""AdaLoRA (arXiv:2303.10512): singular values of LoRA, pruned on a schedule from the recipe's rank to the budget."""

from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig
from transformers import TrainerCallback

from lorazor.bench.experiment import Experiment

BUDGETS = ("params",)


def train(experiment: Experiment) -> Path:
    """PEFT's, its allocator called at every step."""
    own, share = experiment.cell.recipe, experiment.n_parameters / sum(one.n_parameters for one in experiment.sites)
    schedule = {"tinit": own.steps // 10, "tfinal": own.steps // 3, "deltaT": max(1, own.steps // 60)}
    target: Any = own.rank * share  # PEFT multiplies it by the number of sites
    config = AdaLoraConfig(init_r=own.rank, target_r=target, total_step=own.steps, lora_alpha=own.alpha, **schedule)  # pyright: ignore
    return experiment.fit_peft(config, [Allocate()])


class Allocate(TrainerCallback):
    """What PEFT asks of a training loop of AdaLoRA."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the penalty that keeps the singular vectors orthogonal: PEFT adds it to a loss that nothing here uses."""
        model, norms = kwargs["model"], []
        for name, one in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                gram = one @ one.T if one.shape[0] < one.shape[1] else one.T @ one
                norms.append(torch.linalg.norm(gram - torch.eye(len(gram), device=gram.device)))
        (model.peft_config["default"].orth_reg_weight * torch.stack(norms).mean()).backward()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let it move ranks, while the gradients are there."""
        kwargs["model"].base_model.update_and_allocate(state.global_step)
