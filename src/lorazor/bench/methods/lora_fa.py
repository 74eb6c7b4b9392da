"""LoRA-FA (arXiv:2308.03303): A stays as it is drawn, so that no site keeps its input for the backward pass."""

from pathlib import Path

from lorazor.bench.experiment import Experiment

BUDGETS = ()


def train(experiment: Experiment) -> Path:
    """LoRA on all sites of which B alone is trained."""
    loaded, model = experiment.start().on_all()
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    return experiment.fit(model, loaded, "lora-fa")
