"""Evaluations of several adapters."""

from __future__ import annotations

import weakref

import pytest

from lorazor.settings import DataSettings
from lorazor.workflow import evaluate as workflow
from lorazor.workflow.evaluate import EvaluationSettings, evaluate


def test_one_model_is_in_memory_at_a_time(tiny, out, monkeypatch):
    """Counted without our code: every model that was loaded is watched by a weak reference."""
    load, watched, alive = workflow.load, [], []

    def watching(*arguments):
        alive.append(sum(one() is not None for one in watched))
        loaded = load(*arguments)
        watched.append(weakref.ref(loaded.model))
        vars(loaded.model)["circle"] = loaded.model  # as the hooks of a device map make one
        return loaded

    monkeypatch.setattr(workflow, "load", watching)
    evaluate([tiny.adapter, f"{tiny.adapter}/"], str(tiny.held_out), ["loss"], out, with_base=True)
    assert len(watched) == 3 and alive == [0, 0, 0]


def test_an_evaluation_that_ran_out_of_memory_goes_on_with_smaller_batches(tiny, out, monkeypatch):
    def settings(batch_size: int) -> EvaluationSettings:
        return EvaluationSettings(reading=DataSettings(batch_size=batch_size))

    arguments = (str(tiny.held_out), ["loss"])
    whole = evaluate([tiny.adapter], *arguments, out.with_name("whole"), settings(4), True)
    measure, n_batches = workflow.measure_losses, 0

    def full(*given):
        nonlocal n_batches
        n_batches += 1
        if n_batches == 2:
            raise MemoryError
        measure(*given)

    monkeypatch.setattr(workflow, "measure_losses", full)
    with pytest.raises(MemoryError):
        evaluate([tiny.adapter], *arguments, out, settings(4), True)
    monkeypatch.undo()
    resumed = evaluate([tiny.adapter], *arguments, out, settings(1), True, resume=True)
    assert [one.value for one in resumed] == pytest.approx([one.value for one in whole], abs=1e-5)
