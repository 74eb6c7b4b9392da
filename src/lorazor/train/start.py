"""The models that a training starts from: a base model with LoRA on all targets, or on chosen sites."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import set_seed

from lorazor.adapter.base import task_of_model
from lorazor.adapter.directions import equal_norms_
from lorazor.adapter.experts import patterns_of_parameters, targets_of
from lorazor.adapter.folder import read_adapter
from lorazor.adapter.growth import rescale_site_
from lorazor.adapter.head import name_classes_
from lorazor.adapter.load import Loaded, attach, load
from lorazor.adapter.sites import find_sites
from lorazor.adapter.tasks import TASK_TYPES, modules_to_train
from lorazor.data.examples import Example
from lorazor.data.labels import class_names
from lorazor.data.questions import Question
from lorazor.errors import DataError, SelectionError, SettingsError
from lorazor.naming import exact_keys
from lorazor.selection import SelectedSite, Selection
from lorazor.settings import LoraSettings, ModelSettings
from lorazor.train.disconnect import describe_ranks_, grow_


@dataclass(frozen=True)
class Start:
    """Makes the models of a training. The same seed gives the same numbers each time.

    Attributes:
        model: the base model, and the task.
        lora: the shape of the adapter.
        seed: of A, of a head, and of new directions where ranks grow.
        examples: to train on; they say what the task is, and how many classes there are.
    """

    model: ModelSettings
    lora: LoraSettings
    seed: int
    examples: Sequence[Example] | Sequence[Question]

    def on_all(self) -> tuple[Loaded, PeftModel]:
        """The base model with a fresh LoRA on every target."""
        loaded = self.base()
        try:
            return loaded, self.with_lora(loaded, self.lora.rank, target_modules=self.lora.targets)
        except ValueError as error:  # PEFT, of names that are nowhere
            raise SettingsError(f"target_modules={self.lora.target_modules!r}: {str(error).splitlines()[0]}") from error

    def on_chosen(self, selection: Selection) -> tuple[Loaded, PeftModel]:
        """The base model with a fresh LoRA on the kept sites, at the ranks that the selection gives them.

        Raises:
            SelectionError: no site is kept, or they are not in this model, or PEFT cannot train these alone.
            SettingsError: dropout, and sites that are parameters.
        """
        if not selection.kept:
            raise SelectionError("The selection keeps no site, so there is nothing to train.")
        loaded = self.base()
        kept, modules = self._located(loaded, selection), [name for name, _ in loaded.model.named_modules()]
        ranks = {site.name: site.kept_rank for site in kept}
        try:
            model = self.with_lora(loaded, max(ranks.values()), ranks, **targets_of(kept, modules))
        except ValueError as error:  # PEFT, of modules that it has no LoRA for
            raise SelectionError(f"PEFT cannot train the kept sites: {str(error).splitlines()[0]}") from error
        found = {site.name: site.rank for site in find_sites(model)}
        if odd := sorted(found.items() ^ ranks.items()):
            raise SelectionError(
                f"PEFT cannot train exactly the kept sites: {odd[0][0]!r} would differ. It compares ends of names of "
                "parameters, and takes linear maps beside experts for experts. Keep all sites of that kind, or none."
            )
        return loaded, model

    def _located(self, loaded: Loaded, selection: Selection) -> list[SelectedSite]:
        """The kept sites, as modules and parameters of the base model, of which older selections say nothing."""
        names, model = [site.name for site in selection.kept], loaded.model
        modules, parameters = ({name for name, _ in own} for own in (model.named_modules(), model.named_parameters()))
        if strangers := [name for name in names if name not in modules | parameters]:
            raise SelectionError(
                f"{len(strangers)} of the {len(names)} kept sites, such as {strangers[0]!r}, are not in "
                f"{type(model).__name__}. Pass the selection of this base model."
            )
        whole = tuple(f"{part}." for part in modules_to_train(model, loaded.task, loaded.untrained))
        if trained := [name for name in names if f"{name}.".startswith(whole)]:
            raise SelectionError(
                f"{trained[0]!r} is in the head, which is trained whole. Leave it out of the selection."
            )
        if self.lora.dropout and (on_parameters := [name for name in names if name not in modules]):
            raise SettingsError(
                f"dropout={self.lora.dropout:g}, but {on_parameters[0]!r} is a parameter, where PEFT has none. Pass 0."
            )
        return [dataclasses.replace(site, is_on_parameter=site.name not in modules) for site in selection.kept]

    def from_adapter(self, folder: Path, selection: Selection) -> tuple[Loaded, PeftModel]:
        """The base model with a trained adapter to go on with; its ranks grow to those of the selection."""
        loaded = self.base()
        model = attach(loaded.model, read_adapter(folder), is_trainable=True)
        sites, ranks = find_sites(model), {site.name: site.kept_rank for site in selection.kept}
        if any(site.components for site in selection.kept):
            # the step of an optimizer knows nothing of scales: those of the warm-up, and equal norms
            sites = [rescale_site_(site, self.lora.alpha / self.lora.rank) for site in sites]
            equal_norms_(sites)
            describe_ranks_(model, sites)
        if any(ranks[site.name] != site.rank for site in sites):
            generator = torch.Generator().manual_seed(self.seed)
            grow_(model, sites, [ranks[site.name] for site in sites], generator)
        return loaded, model

    def base(self) -> Loaded:
        """The base model, with a head drawn from the seed where the task needs one.

        Raises:
            DataError: the data is of another task than the one asked for, or all of one class.
        """
        gc.collect()  # a model that was trained before is held by its trainer, in a cycle
        set_seed(self.seed)
        labelled = [one for one in self.examples if isinstance(one, Example) and one.is_labelled]
        labels = {one.label_name if one.label is None else one.label for one in labelled}
        has_questions = isinstance(self.examples[0], Question)
        task = self.model.task
        if task == "auto" and (has_questions or labels):
            task = "question-answering" if has_questions else "classification"
        elif task == "auto":
            task = "seq2seq" if task_of_model(self.model) == "seq2seq" else "causal"
        if (task == "classification") != bool(labels) or (task == "question-answering") != has_questions:
            raise DataError(f"task={task!r}, but the data is not of that kind. Pass --task auto, or other data.")
        if len(labels) == 1:
            raise DataError(
                f"Every text has the label {labels.pop()}, so there is nothing to learn. Add other classes."
            )
        names, numbers = class_names(labelled), [one.label for one in labelled if one.label is not None]
        is_regression = any(isinstance(number, float) for number in numbers)
        n_labels = 1 if is_regression else 1 + int(max([*names, *numbers])) if labels else None
        loaded = load(None, self.model, task, n_labels)
        name_classes_(loaded.model.config, names)
        return loaded

    def with_lora(self, loaded: Loaded, rank: int, ranks: Mapping[str, int] | None = None, **targets: Any) -> PeftModel:
        """Put a fresh LoRA on a base model.

        Args:
            loaded: the base model.
            rank: r; alpha grows with it, so that the scale alpha / r stays that of `lora`.
            ranks: of sites, by name, where they differ.
            targets: PEFT's settings that say where, such as `target_modules`.
        Raises:
            ValueError: PEFT's own, such as where no module has such a name.
        """
        set_seed(self.seed)
        keys = exact_keys(ranks or {})
        others = {keys[name]: own for name, own in (ranks or {}).items() if own != rank}
        whole = modules_to_train(loaded.model, loaded.task, loaded.untrained)
        config = LoraConfig(
            r=rank,
            lora_alpha=self._alpha(rank),
            rank_pattern=others,
            alpha_pattern={key: self._alpha(own) for key, own in others.items()},
            lora_dropout=self.lora.dropout,
            task_type=TASK_TYPES[loaded.task],  # pyright: ignore[reportArgumentType]
            modules_to_save=whole.copy() or None,  # PEFT puts no LoRA there
            **targets,
        )
        with patterns_of_parameters():
            model = get_peft_model(loaded.model, config)
        assert isinstance(model, PeftModel)
        config.modules_to_save = whole or None  # without the names that PEFT has added
        return model

    def _alpha(self, rank: int) -> Any:
        """Of a site of another rank than that of `lora`; a whole number where it can be, as PEFT says that it is."""
        alpha = self.lora.alpha * rank / self.lora.rank
        return int(alpha) if alpha == int(alpha) else alpha
