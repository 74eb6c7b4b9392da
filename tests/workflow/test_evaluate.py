"""Evaluations of several adapters."""

from __future__ import annotations

import weakref

from lorazor.workflow import evaluate as workflow
from lorazor.workflow.evaluate import evaluate


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
