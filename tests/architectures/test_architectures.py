"""docs/architectures.md says what is so, and the checks behind it see what is wrong."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lorazor.adapter.parts import Parts
from tests.architectures import checks
from tests.architectures.results import try_family
from tests.architectures.subjects import Subject, lora_factors, make_subject
from tests.architectures.table import PAGE, VERSIONS, read_page
from tests.architectures.tiny_configs import FAMILIES


@pytest.mark.slow
@pytest.mark.parametrize(("task", "family"), FAMILIES, ids=["/".join(one) for one in FAMILIES])
def test_the_page_says_what_comes_of_a_family(task, family, tmp_path):
    result = try_family(task, family, tmp_path)
    gc.collect()
    assert result.failures == []
    assert (result.cells, result.remarks) == read_page()[task, family]


def test_the_page_has_every_family_and_no_failure():
    rows = read_page()
    assert VERSIONS in PAGE.read_text(encoding="utf-8")
    assert list(rows) == FAMILIES
    assert [key for key, (cells, _) in rows.items() if any(cell.startswith("FAILED") for cell in cells.values())] == []


@pytest.fixture
def llama(tmp_path: Path) -> Subject:
    return make_subject("causal", "llama", tmp_path)


@pytest.mark.slow
def test_a_missing_site_is_seen(llama, monkeypatch):
    find_sites = checks.find_sites
    monkeypatch.setattr(checks, "find_sites", lambda model: find_sites(model)[1:])
    with pytest.raises(AssertionError, match="sites of the live model"):
        checks.check_sites(llama)


@pytest.mark.slow
def test_a_boundary_that_is_one_off_is_seen(llama, monkeypatch):
    measured = checks.one_pass_losses

    def one_off(*arguments):
        return {(boundary + 1) % 4: losses for boundary, losses in measured(*arguments).items()}

    monkeypatch.setattr(checks, "one_pass_losses", one_off)
    with pytest.raises(AssertionError, match="losses at boundary 0"):
        checks.check_sweep(llama)


@pytest.mark.slow
def test_gates_that_do_nothing_and_credits_of_other_rows_are_seen(llama, monkeypatch):
    credits_of = checks.path_credit

    def of_other_rows(*arguments):
        credits = credits_of(*arguments)
        return replace(credits, credits=credits.credits[::-1].copy())

    with monkeypatch.context() as patch:
        patch.setattr(checks, "path_credit", of_other_rows)
        with pytest.raises(AssertionError, match="credits of directions"):
            checks.check_directions(llama)
    monkeypatch.setattr(Parts, "gated", lambda *_: nullcontext())
    with pytest.raises(AssertionError, match="losses of gated directions"):
        checks.check_directions(llama)


@pytest.mark.slow
def test_pruning_that_keeps_another_site_is_seen(llama, tmp_path, monkeypatch):
    write_pruned = checks.write_pruned

    def other(adapter, selection, out):
        first, *rest = selection.sites
        write_pruned(adapter, replace(selection, sites=(replace(first, keep=False, components=None), *rest)), out)

    monkeypatch.setattr(checks, "write_pruned", other)
    with pytest.raises(AssertionError, match="losses after pruning"):
        checks.check_prune(llama, tmp_path / "pruned")


@pytest.mark.slow
def test_loading_that_loses_a_weight_is_seen(llama, tmp_path, monkeypatch):
    load = checks.load

    def without_one(*arguments):
        loaded = load(*arguments)
        with torch.no_grad():
            next(iter(lora_factors(loaded.peft_model).values())).zero_()
        return loaded

    monkeypatch.setattr(checks, "load", without_one)
    with pytest.raises(AssertionError, match="losses of what was loaded"):
        checks.check_reload(llama, tmp_path / "run")
