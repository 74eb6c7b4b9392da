"""The models that a training starts from: a base model with LoRA on all targets, or on chosen sites."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import set_seed

from lorazor.adapter.base import task_of_model
from lorazor.adapter.directions import equal_norms_
from lorazor.adapter.experts import patterns_of_parameters
from lorazor.adapter.folder import read_adapter
from lorazor.adapter.load import Loaded, attach, load
from lorazor.adapter.sites import find_sites
from lorazor.adapter.tasks import TASK_TYPES, modules_to_train
from lorazor.data.examples import Example
from lorazor.data.questions import Question
from lorazor.errors import DataError, SelectionError, SettingsError
from lorazor.naming import exact_keys, exact_targets
from lorazor.selection import Selection
from lorazor.settings import LoraSettings, ModelSettings
from lorazor.train.disconnect import grow_


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
        names = [name.strip() for name in self.lora.target_modules.split(",")]
        loaded = self.base()
        return loaded, self.with_lora(loaded, names[0] if names == ["all-linear"] else names, self.lora.rank)

    def on_chosen(self, selection: Selection) -> tuple[Loaded, PeftModel]:
        """The base model with a fresh LoRA on the kept sites, at the ranks that the selection gives them.

        Raises:
            SelectionError: no site is kept, their ranks differed before any of them kept a part, or they are not in
                this model.
        """
        names = [site.name for site in selection.kept]
        if not names:
            raise SelectionError("The selection keeps no site, so there is nothing to train.")
        whole_ranks = {site.rank for site in selection.kept}
        if len(whole_ranks) > 1:
            raise SelectionError(
                f"The kept sites have ranks {sorted(whole_ranks)}. Pass a selection with a single rank, of which sites "
                "may keep a part."
            )
        loaded = self.base()
        modules = {name for name, _ in loaded.model.named_modules()}
        strangers = [name for name in names if name not in modules]
        if strangers:
            raise SelectionError(
                f"{len(strangers)} of the {len(names)} kept sites, such as {strangers[0]!r}, are not in "
                f"{type(loaded.model).__name__}. Pass the selection of this base model."
            )
        whole = tuple(f"{part}." for part in modules_to_train(loaded.model, loaded.task, loaded.untrained))
        if trained := [name for name in names if f"{name}.".startswith(whole)]:
            raise SelectionError(
                f"{trained[0]!r} is in the head, which is trained whole. Leave it out of the selection."
            )
        ranks = {site.name: site.kept_rank for site in selection.kept}
        return loaded, self.with_lora(loaded, exact_targets(names, modules), whole_ranks.pop(), ranks)

    def from_adapter(self, folder: Path, selection: Selection) -> tuple[Loaded, PeftModel]:
        """The base model with a trained adapter to go on with; its ranks grow to those of the selection."""
        loaded = self.base()
        model = attach(loaded.model, read_adapter(folder), is_trainable=True)
        sites, ranks = find_sites(model), {site.name: site.kept_rank for site in selection.kept}
        if any(site.components for site in selection.kept):
            equal_norms_(sites)  # the step of an optimizer knows nothing of their scale
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
        labels = {one.label for one in self.examples if isinstance(one, Example) and one.label is not None}
        has_questions = isinstance(self.examples[0], Question)
        task = self.model.task
        if task == "auto" and (has_questions or labels):
            task = "question-answering" if has_questions else "classification"
        elif task == "auto":
            task = "seq2seq" if task_of_model(self.model) == "seq2seq" else "causal"
        if (task == "classification") != bool(labels) or (task == "question-answering") != has_questions:
            raise DataError(f"task={task!r}, but the data is not of that kind. Pass --task auto, or other data.")
        if len(labels) == 1:
            raise DataError(f"Every text has the label {max(labels)}, so there is nothing to learn. Add other classes.")
        return load(None, self.model, task, 1 + max(labels) if labels else None)

    def with_lora(
        self, loaded: Loaded, targets: str | Sequence[str], rank: int, ranks: Mapping[str, int] | None = None
    ) -> PeftModel:
        """Put a fresh LoRA on a base model.

        Args:
            loaded: the base model.
            targets: "all-linear", names of modules or a regular expression, as PEFT takes them.
            rank: r; alpha grows with it, so that the scale alpha / r stays that of `lora`.
            ranks: of sites by name, where some have lower ones; alpha is the same for all.
        Raises:
            SettingsError: no module has such a name.
        """
        set_seed(self.seed)
        alpha = self.lora.alpha * rank / self.lora.rank
        whole = modules_to_train(loaded.model, loaded.task, loaded.untrained)
        largest, keys = max(ranks.values()) if ranks else rank, exact_keys(ranks or {})
        config = LoraConfig(
            r=largest,
            rank_pattern={keys[name]: one for name, one in (ranks or {}).items() if one != largest},
            lora_alpha=int(alpha) if alpha.is_integer() else alpha,  # pyright: ignore[reportArgumentType]
            lora_dropout=self.lora.dropout,
            target_modules=targets if isinstance(targets, str) else list(targets),
            task_type=TASK_TYPES[loaded.task],  # pyright: ignore[reportArgumentType]
            modules_to_save=whole.copy() or None,  # PEFT puts no LoRA there
        )
        try:
            with patterns_of_parameters():
                model = get_peft_model(loaded.model, config)
        except ValueError as error:  # PEFT, of names that are nowhere
            raise SettingsError(f"target_modules={self.lora.target_modules!r}: {str(error).splitlines()[0]}") from error
        assert isinstance(model, PeftModel)
        config.modules_to_save = whole or None  # without the names that PEFT has added
        return model
