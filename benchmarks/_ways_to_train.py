"""Ways to train an adapter that ends with a given number of parameters, on the same batches."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, get_peft_model
from transformers import TrainerCallback

from lorazor import (
    BudgetSettings,
    ChoosingSettings,
    DataSettings,
    Example,
    FitSettings,
    LoraSettings,
    ModelSettings,
    SelectedSite,
    Selection,
    Site,
    TrainSettings,
    find_sites,
    shrink,
    train_adapter,
)
from lorazor.adapter.prune import write_pruned
from lorazor.adapter.sites import site_parameters
from lorazor.adapter.tasks import TASK_TYPES
from lorazor.data.batches import make_batches
from lorazor.measure.losses import differentiable_row_losses
from lorazor.select.projection import sites_for_parameters
from lorazor.select.scores import control_scores
from lorazor.select.weightlora import Schedule, WeightLoraSettings
from lorazor.train.answers import make_rows
from lorazor.train.choose import ChooseSites
from lorazor.train.fit import fit
from lorazor.train.start import Start

RANK = 8


@dataclass
class Experiment:
    """One seed: the model, the data, and a folder for everything that is trained."""

    arguments: argparse.Namespace
    seed: int
    train: list[Example]
    dev: list[Example]
    test: list[Example]
    folder: Path

    def settings(self, rank: int = RANK, steps: int | None = None, **fields: Any) -> TrainSettings:
        """Of `lorazor train`; alpha is 2 r."""
        args = self.arguments
        return TrainSettings(
            lora=LoraSettings(rank, 2 * rank, target_modules=args.target_modules),
            fit=FitSettings(steps or args.steps, args.learning_rate, args.rise_steps, save_steps=10**9, seed=self.seed),
            model=ModelSettings(args.model, args.gguf_file, "float32", device_map="cpu"),
            batch_size=args.batch_size,
            **fields,
        )

    def new(self, name: str) -> Path:
        """A folder that is not there."""
        path = self.folder / name
        shutil.rmtree(path, ignore_errors=True)
        return path

    def trained(self, name: str, settings: TrainSettings) -> Path:
        """What `lorazor train` writes."""
        return train_adapter(self.train, out=self.new(name), settings=settings).out

    def start(self) -> Start:
        settings = self.settings()
        return Start(settings.model, settings.lora, self.seed, self.train)

    @cached_property
    def sites(self) -> list[Site]:
        return list(find_sites(self.start().on_all()[1]))

    def chosen(self, scores: Sequence[float], n_parameters: int) -> Selection:
        """The sites of highest score that fit."""
        kept = sites_for_parameters(scores, [site.n_parameters for site in self.sites], n_parameters).tolist()
        return Selection(
            tuple(
                SelectedSite(site.name, site.layer, site.stack, site.kind, site.rank, stays, score=float(score))
                for site, score, stays in zip(self.sites, scores, kept, strict=True)
            ),
            "benchmark",
        )

    def fit(self, model: Any, loaded: Any, name: str, span: range | None = None, callbacks: Any = ()) -> Path:
        """The adapter after some steps of the training."""
        rows, _ = make_rows(loaded, self.train)
        folder, training = self.new(name), self.settings().fit
        fit(model, loaded, rows, folder, training, self.arguments.batch_size, span, callbacks, save_to=folder)
        return folder

    def warmup(self, schedule: Schedule, n_parameters: int | None) -> Path:
        """The warm-up on all sites, with `scores.jsonl` and, where the schedule drops sites, `selection.json`."""
        folder = self.folder / f"warmup-{schedule}-{n_parameters}"
        if (folder / "scores.jsonl").exists():
            return folder
        loaded, model = self.start().on_all()
        mean_size = sum(site.n_parameters for site in self.sites) / len(self.sites)
        keep = len(self.sites) if n_parameters is None else max(1, int(n_parameters / mean_size))
        steps = self.arguments.select_steps
        settings = WeightLoraSettings(keep, steps, schedule, self.arguments.gate_lr, steps // 4)
        return self.fit(model, loaded, folder.name, range(steps), [ChooseSites(settings, self.seed)])

    def go_on(self, warmup: Path, selection: Selection, name: str) -> Path:
        """Train what a warm-up chose for the steps that are left, from what it learned."""
        kept = self.new(f"{name}-kept")
        write_pruned(warmup, selection, kept)
        loaded, model = self.start().from_adapter(kept, Selection(selection.kept, selection.method))
        return self.fit(model, loaded, name, range(self.arguments.select_steps, self.arguments.steps))


def full(experiment: Experiment, n_parameters: int) -> Path:
    """LoRA of rank 8 on all sites."""
    return experiment.trained("full", experiment.settings())


def low_rank(experiment: Experiment, n_parameters: int) -> Path:
    """LoRA of the highest rank that fits on all sites."""
    rank = RANK * n_parameters // sum(site.n_parameters for site in experiment.sites)
    if rank < 1:
        raise ValueError("rank 1 on all sites is more than that")
    return experiment.trained("low-rank", experiment.settings(rank))


def control(name: str, experiment: Experiment, n_parameters: int) -> Path:
    """Fresh LoRA on sites that no data chose."""
    scores = control_scores(experiment.sites, experiment.seed)[name].tolist()
    return on_sites(experiment, name, experiment.chosen(scores, n_parameters))


def on_sites(experiment: Experiment, name: str, selection: Selection) -> Path:
    path = experiment.folder / f"{name}.json"
    selection.save(path)
    return experiment.trained(name, experiment.settings(selection=path))


def domlora(experiment: Experiment, n_parameters: int) -> Path:
    """DomLoRA (arXiv:2605.06183): one site, that of the largest gradient of B at the start; here at the whole size."""
    loaded, model = experiment.start().on_all()
    sites, energy = find_sites(model), torch.zeros(len(experiment.sites))
    few = experiment.train[: 16 * experiment.arguments.batch_size]
    assert loaded.task != "question-answering"
    for batch in make_batches(few, loaded.tokenizer, loaded.task, experiment.arguments.batch_size).batches:
        losses = differentiable_row_losses(loaded.model, batch)
        (losses.nll_nats.sum() / losses.n_tokens.sum()).backward()
        for place, site in enumerate(sites):
            gradient = site_parameters(site.module, site.adapter)[1].grad
            assert gradient is not None
            energy[place] += float(gradient.square().sum())
        model.zero_grad()
    best = experiment.sites[int(energy.argmax())]
    rank = RANK * n_parameters // best.n_parameters
    loaded = experiment.start().base()
    start = replace(experiment.start(), lora=experiment.settings(rank).lora)
    model = start.with_lora(loaded, rank, target_modules=[best.name])
    return experiment.fit(model, loaded, "domlora")


def adalora(experiment: Experiment, n_parameters: int) -> Path:
    """PEFT's AdaLoRA from rank 8, its allocator called at every step, its penalty added to the gradients."""
    loaded, args = experiment.start().base(), experiment.arguments
    share = n_parameters / sum(site.n_parameters for site in experiment.sites)
    names = [name.strip() for name in args.target_modules.split(",")]
    config = AdaLoraConfig(
        init_r=RANK,
        target_r=RANK * share,  # pyright: ignore[reportArgumentType]  # PEFT multiplies it by the number of sites
        tinit=args.steps // 10,
        tfinal=args.steps // 3,
        deltaT=max(1, args.steps // 60),
        total_step=args.steps,
        lora_alpha=2 * RANK,
        target_modules=names if len(names) > 1 else names[0],
        task_type=TASK_TYPES[loaded.task],  # pyright: ignore[reportArgumentType]
    )
    torch.manual_seed(experiment.seed)
    return experiment.fit(get_peft_model(loaded.model, config), loaded, "adalora", callbacks=[Allocate()])


class Allocate(TrainerCallback):
    """What PEFT asks of a training loop of AdaLoRA."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the penalty that keeps the singular vectors orthogonal: PEFT adds it to a loss that nothing here uses."""
        model, penalty = kwargs["model"], torch.zeros(())
        weight = model.peft_config["default"].orth_reg_weight
        factors = [one for name, one in model.named_parameters() if "lora_A" in name or "lora_B" in name]
        for one in factors:
            gram = one @ one.T if one.shape[0] < one.shape[1] else one.T @ one
            penalty = penalty + torch.linalg.norm(gram - torch.eye(len(gram)))
        (weight * penalty / len(factors)).backward()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let it move ranks, while the gradients are there."""
        kwargs["model"].base_model.update_and_allocate(state.global_step)


def by_score(score: str, is_per_parameter: bool, experiment: Experiment, n_parameters: int) -> Path:
    """WeightLoRA, one cut: sites by what a warm-up with gates says of them."""
    warmup = experiment.warmup("one-cut", None)
    rows = [json.loads(line) for line in (warmup / "scores.jsonl").read_text().splitlines()]
    by_name = {row["site"]: row[score] / (row["n_parameters"] if is_per_parameter else 1) for row in rows}
    selection = experiment.chosen([by_name[site.name] for site in experiment.sites], n_parameters)
    return experiment.go_on(warmup, selection, score)


def by_schedule(schedule: Schedule, experiment: Experiment, n_parameters: int) -> Path:
    """WeightLoRA's gates with a schedule that drops sites as it goes: K sites of whatever size."""
    warmup = experiment.warmup(schedule, n_parameters)
    return experiment.go_on(warmup, Selection.load(warmup / "selection.json"), schedule)


def directions(score: str, experiment: Experiment, n_parameters: int) -> Path:
    """WeightLoRA by directions."""
    choosing = ChoosingSettings(select_steps=experiment.arguments.select_steps, score=score, by="direction")
    budget = BudgetSettings(params=n_parameters)
    return experiment.trained(
        f"directions-{score}", experiment.settings(method="weightlora", choosing=choosing, budget=budget)
    )


def shrunk(experiment: Experiment, n_parameters: int) -> Path:
    """LoRA of rank 8 on all sites for the first steps, then `shrink --heal` for those that are left."""
    args, source = experiment.arguments, experiment.folder / "to-shrink"
    if not (source / "adapter_config.json").exists():
        experiment.trained(source.name, experiment.settings(steps=args.steps - args.heal_steps))
    n_seen = args.batch_size * (args.steps - args.heal_steps)
    result = shrink(
        source,
        experiment.dev,
        out=experiment.new("shrunk"),
        heal=experiment.train[n_seen : n_seen + args.batch_size * args.heal_steps],
        params=n_parameters,
        heal_steps=args.heal_steps,
        heal_lr=args.heal_lr,
        seed=experiment.seed,
        model=experiment.settings().model,
        reading=DataSettings(batch_size=args.batch_size),
    )
    assert result.pruned is not None
    return Path(result.pruned.path)


METHODS: dict[str, Callable[[Experiment, int], Path]] = {
    "full": full,
    "low rank": low_rank,
    "first sites": partial(control, "first-layers"),
    "last sites": partial(control, "last-layers"),
    "random sites": partial(control, "random"),
    "DomLoRA": domlora,
    "AdaLoRA": adalora,
    "gate": partial(by_score, "gate", False),
    "gate, every step": partial(by_schedule, "every-step"),
    "gate, progressive": partial(by_schedule, "progressive"),
    "credit": partial(by_score, "loss-change", False),
    "credit per parameter": partial(by_score, "loss-change", True),
    "sensitivity": partial(by_score, "sensitivity", False),
    "directions": partial(directions, "fisher"),
    "directions, balanced": partial(directions, "balanced"),
    "shrink --heal": shrunk,
}
"""Each trains to a budget and gives the adapter's folder."""
