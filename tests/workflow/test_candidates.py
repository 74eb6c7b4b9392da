"""The fixed sequence of a certificate: what validation showed, the largest first, and the proposal last."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from lorazor.workflow.candidates import Candidates


def adapter(n_kept: int, name: str = "") -> SimpleNamespace:
    gates = torch.zeros(20)
    gates[:n_kept] = 1
    return SimpleNamespace(gates=gates, adapter=name, n_kept=n_kept)


@pytest.mark.parametrize(
    ("passed", "proposal", "asked"),
    [
        ([10, 5, 3], 3, [10, 5, 3]),
        ([3, 5, 10, 5, 20], 3, [10, 5, 3]),  # the full adapter is never asked about, and none twice
        ([3], 3, [3]),
        ([], 3, [3]),
        ([1, 2, 10, 3], 3, [10, 3]),  # passed under a wider margin, before healing
        ([16, 14, 12, 10, 8, 6, 3], 3, [16, 12, 8, 3]),
    ],
)
@pytest.mark.parametrize("n_shown", [0, 1, 99])
def test_the_sequence(passed, proposal, asked, n_shown):
    said: list[int] = []

    def on_held_out(variant, margin):
        said.append(variant.n_kept)
        return SimpleNamespace(outcome="shown" if len(said) <= n_shown else "undecided", n_kept=variant.n_kept)

    everything = [(adapter(n), None) for n in passed] + [(adapter(12, "healed"), None), (adapter(7), "a wider margin")]
    stand_in = SimpleNamespace(
        passed=everything, full=adapter(20), parts=range(20), as_written=lambda one: one, on_held_out=on_held_out
    )
    stand_in.passed_within = partial(Candidates.passed_within, cast(Any, stand_in))
    found, verdict = Candidates.certify(cast(Any, stand_in), cast(Any, adapter(proposal)), cast(Any, None))
    assert said == asked[: n_shown + 1]
    if n_shown:
        assert cast(Any, found).n_kept == cast(Any, verdict).n_kept == asked[min(n_shown, len(asked)) - 1]
    else:
        assert found is None and cast(Any, verdict).n_kept == asked[0]
