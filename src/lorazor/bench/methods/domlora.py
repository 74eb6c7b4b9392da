"""DomLoRA (arXiv:2605.06183): one site, that of the largest gradient of B at the start, at the whole size."""

from pathlib import Path

from lorazor.adapter.sites import find_sites, site_parameters
from lorazor.bench.experiment import Experiment
from lorazor.data.batches import make_batches
from lorazor.data.examples import Example
from lorazor.measure.engines import on_model
from lorazor.measure.losses import differentiable_row_losses
from lorazor.selection import SelectedSite, Selection

BUDGETS = ("params",)


def train(experiment: Experiment, *, n_batches: int = 16) -> Path:
    """Gradients of the first batches, summed as the squares of each."""
    loaded, model = experiment.start().on_all()
    energy, size = dict.fromkeys((site.name for site in experiment.sites), 0.0), experiment.cell.recipe.batch_size
    few = [one for one in experiment.train[: n_batches * size] if isinstance(one, Example)]
    assert loaded.task != "question-answering"
    for batch in make_batches(few, loaded.tokenizer, loaded.task, size, experiment.cell.spec.max_length).batches:
        losses = differentiable_row_losses(loaded.model, on_model(loaded.model, batch))
        (losses.nll_nats.sum() / losses.n_tokens.sum()).backward()
        for site in find_sites(model):
            gradient = site_parameters(site.module, site.adapter)[1].grad
            energy[site.name] += 0.0 if gradient is None else float(gradient.square().sum())
        model.zero_grad()
    best = max(experiment.sites, key=lambda site: energy[site.name])
    rank = experiment.rank_on([best])
    kept = SelectedSite(best.name, best.layer, best.stack, best.kind, rank, True)
    return experiment.on_sites(Selection((kept,), "benchmark"))
