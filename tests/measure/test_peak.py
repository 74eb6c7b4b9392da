"""The peak of memory, with CUDA's allocator played by a counter."""

from __future__ import annotations

import pytest
import torch

from lorazor.measure.peak import count_anew, forget_peak, peak


class Allocator:
    """As `torch.cuda` counts: the most that was held at one time since the last reset."""

    def __init__(self) -> None:
        self.held = self.most = 0

    def hold(self, n_bytes: int) -> None:
        self.held, self.most = n_bytes, max(self.most, n_bytes)

    def reset(self, device: torch.device | None = None) -> None:
        self.most = self.held


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> Allocator:
    found = Allocator()
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", found.reset)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda device=None: found.most)
    return found


def test_a_training_that_counts_for_itself_hides_no_earlier_peak(allocator: Allocator) -> None:
    allocator.hold(900)
    allocator.hold(100)
    forget_peak()
    assert peak() == 100
    allocator.hold(500)  # a selection run with all sites
    allocator.hold(100)
    count_anew(torch.device("cuda", 0))  # the run that trains the chosen ones
    allocator.hold(300)
    assert allocator.most == 300
    assert peak() == 500
    forget_peak()
    assert peak() == 300
