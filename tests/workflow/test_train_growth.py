"""WeightLoRA+ from start to end, with ranks that serving stacks take."""

from __future__ import annotations

import json

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lorazor.adapter.sites import find_sites
from lorazor.selection import Selection
from lorazor.workflow.train import train_adapter
from tests.workflow.test_train import settings_of


@pytest.mark.slow
def test_grown_ranks_are_those_that_stacks_serve_unless_the_papers_are_asked_for(tiny, out):
    """Both runs train the same sites at the same rank; the run says what it came to."""
    settings = settings_of(tiny, method="weightlora+", choosing__growth="served")
    result = train_adapter(str(tiny.validation), out=out, settings=settings)
    kept = Selection.load(out / "selection.json").kept
    assert {site.rank for site in kept} == {8} and len(kept) > 5
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny.base), out)
    assert {(site.name, site.rank) for site in find_sites(model)} == {(site.name, 8) for site in kept}
    assert result.n_sites == len(kept)
    assert result.n_parameters == sum(site.n_parameters for site in find_sites(model))
    notes = json.loads((out / "run.json").read_text())["notes"]
    assert notes[0].startswith(f"Kept {len(kept)} of 28 sites") and notes[0].endswith("which grow to rank 8.")
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (8, 16, {})
