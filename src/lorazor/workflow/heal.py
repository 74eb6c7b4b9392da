"""Healing: what stays of an adapter is trained for a few steps, so that it makes up for what went."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from lorazor.adapter.directions import equal_norms_
from lorazor.adapter.folder import AdapterFolder, read_adapter
from lorazor.adapter.live import twin_of
from lorazor.adapter.load import Loaded, swap
from lorazor.data.examples import Example
from lorazor.errors import DataError, SettingsError
from lorazor.measure.gradients import checkpointed
from lorazor.measure.meter import HEAL, Meter, Variant
from lorazor.measure.metrics import metric_named
from lorazor.measure.sharding import from_main_process, this_process
from lorazor.select.verdict import Margin
from lorazor.settings import FitSettings, ShrinkSettings
from lorazor.train.answers import TrainingRow, make_rows
from lorazor.train.fit import fit
from lorazor.workflow.candidates import HEALED, Candidates, scaled
from lorazor.workflow.written import Writer, narrow_

_WIDER = (4.0, 2.0, 1.0)
"""Healing wins most of a loss back, so that adapters are tried which lose so many margins before it."""

LOG_FILE, FOLDER = "healing.jsonl", "healing"

_RAMP = 10
"""The learning rate rises over a tenth of the steps."""


@dataclass(frozen=True)
class Healing:
    """Smaller adapters, healed one after the other until one is good enough.

    Attributes:
        candidates: what may be chosen, and the meter.
        writer: writes them.
        settings: of the healing.
        rows: to train on.
    """

    candidates: Candidates
    writer: Writer
    settings: ShrinkSettings
    rows: Sequence[TrainingRow]

    def choose(self, proposal: Variant, margin: Margin | None) -> tuple[Variant, Variant | None]:
        """A smaller adapter that healing brings within the margin, or the proposal, healed if that is better.

        Returns:
            What stays, and the same after healing as a variant of the adapter that is on the model now; None where the
            validation examples like it no better.
        """
        candidates = self.candidates
        candidates.measure_others(margin)
        seen = {candidates.full.digest}
        for variant in self._tried(proposal, margin):
            if variant.digest in seen:
                continue
            seen.add(variant.digest)
            healed = self._healed(variant)
            if self._is_better(healed, variant, margin):
                return variant, healed
            self._restore()
        return proposal, None

    def folder_of(self, variant: Variant) -> Path:
        """Where the healed form of a variant is."""
        return self.writer.run.path / FOLDER / f"{variant.digest}-healed"

    def _tried(self, proposal: Variant, margin: Margin | None) -> Iterator[Variant]:
        """Adapters to heal, the smallest first."""
        if margin is not None:
            for factor in _WIDER[:-1]:
                yield self.candidates.within(scaled(margin, factor))
        yield proposal

    def _healed(self, variant: Variant) -> Variant:
        """Heal one; the healed adapter is on the model afterwards."""
        candidates, meter = self.candidates, self.candidates.meter
        healed = self.folder_of(variant)
        smaller = healed.with_name(variant.digest)
        meter.say(f"Healing {variant.label}: {self.settings.heal_steps} steps.")
        self.writer.write(variant, smaller)
        full = self.writer.folder if self.settings.heal_from == "full" else None
        run, label = self.writer.run, variant.label

        def note(log: list[dict[str, Any]]) -> None:
            others = [row for row in run.rows(LOG_FILE) if row["adapter"] != label]
            run.write_rows(LOG_FILE, others + [{"adapter": label} | entry for entry in log])

        loaded = heal(meter.loaded, smaller, healed, self.rows, self.settings, full, note)
        meter.use(loaded, f"{HEALED} {variant.digest}")
        found = dataclasses.replace(meter.full, label=f"{variant.label}, healed")
        candidates.note([found])
        return found

    def _is_better(self, healed: Variant, variant: Variant, margin: Margin | None) -> bool:
        """Whether the validation examples like it better than the same unhealed, and find it within the margin."""
        measured = self.candidates.measured
        sign = 1 if metric_named(self.candidates.metric).higher_is_better else -1
        if not sign * (measured[healed.digest].value - measured[variant.digest].value) > 0:
            return False
        return margin is None or self.candidates.judge([healed], margin)[0].outcome == "shown"

    def _restore(self) -> None:
        """Put the adapter that is shrunk back on the model, in its basis."""
        meter, candidates = self.candidates.meter, self.candidates
        loaded = swap(meter.loaded, self.writer.folder)
        self.writer.basis.put_on_(loaded.sites)
        meter.use(loaded, "")
        candidates.scores = dataclasses.replace(candidates.scores, parts=meter.parts)


def heal(
    loaded: Loaded,
    smaller: Path,
    healed: Path,
    rows: Sequence[TrainingRow],
    settings: ShrinkSettings,
    full: AdapterFolder | None = None,
    on_log: Callable[[list[dict[str, Any]]], None] = lambda log: None,
) -> Loaded:
    """Train A and B of a smaller adapter, by cross-entropy on the answers or by distillation, and put it on the base.

    The norms of a_j and b_j are made equal first: the step of an optimizer knows nothing of their scale. Nothing is
    dropped out, neither in front of A nor in the base: what is learned is the adapter as it is used. A run that was
    interrupted goes on from its last checkpoint, and one that has finished is not run again.

    Args:
        loaded: the base model with any adapter on it; of no use afterwards.
        smaller: folder of the smaller adapter.
        healed: folder for the healed one; checkpoints lie beside it.
        rows: to train on.
        settings: steps, learning rate, precision, batch size and seed.
        full: the adapter to learn from, in place of the answers: the same base weights with this one on them.
        on_log: receives what the trainer logged, an entry per logging step, when it has ended.
    Returns:
        The base model with the healed adapter on it, as it was written.
    """
    if not from_main_process((healed / "adapter_config.json").exists):
        teacher = None if full is None else teacher_of(loaded, full)
        loaded = swap(loaded, read_adapter(smaller), is_trainable=True)
        equal_norms_(loaded.sites)
        assert loaded.peft_model is not None
        training = FitSettings(
            steps=settings.heal_steps,
            learning_rate=settings.heal_lr,
            rise_steps=settings.heal_steps // _RAMP,
            weight_decay=0.0,
            precision=settings.precision,
            accumulation=settings.heal_accumulation,
            save_steps=max(10, settings.heal_steps // 4),
            seed=settings.seed,
        )
        checkpoints = healed.with_name(f"{healed.name}-checkpoints")  # of no other adapter, should this run stop
        with checkpointed(loaded.model, settings.gradient_checkpointing):
            fitted = fit(
                loaded.peft_model, loaded, rows, checkpoints, training, settings.reading.batch_size,
                resume=True, save_to=healed, label="healing", teacher=teacher, has_dropout=False,
            )  # fmt: skip
        on_log(fitted.log)
        from_main_process(lambda: shutil.rmtree(checkpoints, ignore_errors=True))
    from_main_process(lambda: narrow_(healed, like=smaller))
    return swap(loaded, read_adapter(healed))


def teacher_of(loaded: Loaded, full: AdapterFolder) -> PreTrainedModel:
    """The full adapter on the same base weights, beside what is on the model; it takes the memory of an adapter."""
    twin = twin_of(loaded.model if loaded.peft_model is None else loaded.peft_model)
    base: Any = twin.get_base_model() if isinstance(twin, PeftModel) else twin
    beside = dataclasses.replace(loaded, model=base, peft_model=twin if isinstance(twin, PeftModel) else None)
    return swap(beside, full).model


def rows_of(loaded: Loaded, examples: Sequence[Example], settings: ShrinkSettings) -> list[TrainingRow]:
    """Encode examples to heal on, but for prompts that have no answer yet.

    Raises:
        DataError: an example that cannot be used with this model.
    """
    answered = [one for one in examples if one.completion or one.is_labelled]
    try:
        return make_rows(loaded, answered, settings.reading.max_length)[0] if answered else []
    except DataError as error:
        raise DataError(f"{settings.heal!r} cannot be healed on. {error}") from error


def with_answers(meter: Meter, examples: Sequence[Example], n_needed: int) -> Sequence[Example]:
    """Give prompts without an answer that of the full adapter, which is on the model; it is kept in the run.

    Texts to classify get a label that nobody looks at: it marks where the logits are compared.

    Args:
        meter: writes the answers.
        examples: to heal on.
        n_needed: examples of a step.
    Raises:
        DataError: too few prompts get an answer.
    """
    lacking = [one for one in examples if not one.completion and not one.is_labelled]
    if not lacking:
        return examples
    if meter.loaded.task == "classification":
        label = 0.0 if meter.loaded.n_classes == 1 else 0
        return [one if one.is_labelled else dataclasses.replace(one, label=label) for one in examples]
    meter.add(HEAL, lacking, f"{HEAL}-", has_answers=False)
    meter.say(f"Writing answers of the full adapter to {len(lacking)} prompts, to heal on.")
    (rows,) = meter.answers([meter.full], HEAL)
    texts = {one.index: rows[one.index]["text"] for one in lacking}
    answered = [dataclasses.replace(one, completion=texts.get(one.index, one.completion)) for one in examples]
    found = [one for one in answered if one.completion.strip() or one.is_labelled]
    if n_empty := len(answered) - len(found):
        meter.say(f"{n_empty} prompts are left out: the full adapter answers nothing.")
    if len(found) < n_needed:
        raise DataError(
            f"The full adapter answers {len(found)} of {len(examples)} prompts to heal on, and a step reads {n_needed}."
            " Pass more prompts, or examples with answers."
        )
    return found


def check_healing(settings: ShrinkSettings, examples: Sequence[Example]) -> None:
    """Refuse settings and examples that cannot work.

    Raises:
        SettingsError: the learning rate is out of range, or settings that do not go together.
        DataError: fewer examples than a step reads.
    """
    if settings.heal is None:
        if settings.heal_from != "full":
            raise SettingsError(f"heal_from={settings.heal_from!r} says how to heal. Pass --heal as well, or neither.")
        return
    if not settings.heal_lr > 0:
        raise SettingsError(f"heal_lr={settings.heal_lr} must be above 0.")
    n_processes = this_process().num_processes
    if settings.reading.batch_size % (n_processes * settings.heal_accumulation):
        shared = "" if n_processes == 1 else f" of {n_processes} processes each"
        raise SettingsError(
            f"heal_accumulation={settings.heal_accumulation} passes{shared} cannot share the "
            f"batch_size={settings.reading.batch_size} examples of a step. Pass divisors of it."
        )
    if len(examples) < settings.reading.batch_size:
        raise DataError(
            f"{settings.heal!r} has {len(examples)} examples, and a step of healing reads "
            f"{settings.reading.batch_size}. Pass more, such as the data that the adapter was trained on."
        )
