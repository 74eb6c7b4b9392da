"""The rule on curves drawn by hand: where they part, where they settle, and where they do neither."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorazor.errors import SettingsError
from lorazor.select.boundary import propose_boundary

SMALL = 0.001


def propose(*gap: float, error: float = SMALL, **settings):
    return propose_boundary(np.array(gap), np.full(len(gap), error), **settings)


def test_a_gap_that_opens_in_the_middle_and_stays():
    proposal = propose(0, 0, 0.1, 0.3, 0.5, 0.5, 0.49, 0.5)
    assert (proposal.boundary, proposal.parted_at) == (4, 2)
    assert "Boundary 4 of 7" in proposal.reason and "after layer 2" in proposal.reason
    assert "within 10%" in proposal.reason and "+0.5000 ± 0.0010" in proposal.reason


def test_a_gap_that_grows_to_the_end_drops_nothing():
    proposal = propose(0, 0.1, 0.2, 0.3, 0.4)
    assert proposal.boundary == 4
    assert "no layer can be dropped" in proposal.reason


def test_a_gap_that_overshoots_has_not_settled_before_it_comes_back():
    assert propose(0, 0.2, 0.5, 0.9, 0.7, 0.51, 0.5).boundary == 5


def test_curves_that_part_meet_and_part_again_part_for_good_later():
    proposal = propose(0, 0.5, 0.0, 0.5, 0.5)
    assert (proposal.boundary, proposal.parted_at) == (3, 3)


@pytest.mark.parametrize(
    ("gap", "error", "says"),
    [
        ((0.0, 0.0, 0.0), 0.0, "does not clearly change"),
        ((0.0, 0.1, 0.1), 0.06, "does not clearly change"),
        ((0.0, 0.4, 0.01), 0.01, "does not clearly change"),
        ((0.0, 0.1, -0.1), 0.01, "lowers"),
    ],
)
def test_curves_that_do_not_part_propose_nothing(gap, error, says):
    proposal = propose(*gap, error=error)
    assert (proposal.boundary, proposal.parted_at) == (None, None)
    assert proposal.reason.startswith("No boundary") and says in proposal.reason


def test_a_close_gap_that_is_not_clear_yet_does_not_count():
    gap, error = np.array([0.0, 0.5, 0.5, 0.5]), np.array([0.1, 0.3, 0.1, 0.1])
    proposal = propose_boundary(gap, error)
    assert (proposal.boundary, proposal.parted_at) == (2, 2)


def test_the_boundary_is_not_above_the_last_layer_with_lora():
    assert propose(0, 0.1, 0.2, 0.3, 0.4, n_adapted=2).boundary == 2


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
def test_a_tolerance_out_of_range_is_refused(share):
    with pytest.raises(SettingsError, match="settled_within"):
        propose(0, 0.5, settled_within=share)


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=12), st.floats(0, 0.2), st.floats(0.01, 0.9))
def test_the_boundary_is_the_first_layer_that_fits_the_definition(gap, error, share):
    proposal = propose(*gap, error=error, settled_within=share)
    last = len(gap) - 1

    def fits(layer: int) -> bool:
        later = range(layer, len(gap))
        return all(gap[m] > 2 * error and abs(gap[m] - gap[last]) <= share * gap[last] for m in later)

    assert proposal.boundary == next((layer for layer in range(len(gap)) if fits(layer)), None)
