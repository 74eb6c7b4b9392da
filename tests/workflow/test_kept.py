"""Selections on a model in memory, for all or for each row, against each row alone and against pruned folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

import lorazor
from lorazor.adapter.parts import Parts
from lorazor.selection import Selection
from tests.tiny_models import tiny_inputs, tiny_peft_model

GENERATION: dict[str, dict[str, Any]] = {
    "greedy, cached": {"num_beams": 1},
    "greedy, no cache": {"num_beams": 1, "use_cache": False},
    "beams": {"num_beams": 3},
    "beams, two answers": {"num_beams": 4, "num_return_sequences": 2},
}
FAST = (("greedy, cached", 10), ("beams", 7))  # 10 are as many tokens as rows


def selections(model: PeftModel, n: int = 10) -> list[Selection]:
    """Of all kinds: random directions with weights, whole sites, everything, nothing."""
    parts = Parts(tuple(lorazor.find_sites(model)))
    generator = torch.Generator().manual_seed(0)
    chosen = []
    for index in range(n):
        gates = (torch.rand(len(parts), generator=generator) < 0.5).float() * (1 + 0.1 * index)
        if index == 3:
            gates = torch.zeros(len(parts))
        if index == 4:
            gates = torch.ones(len(parts))
        if index == 5:
            gates = lorazor.site_gates(parts.sites, torch.arange(len(parts.sites)) % 2).float()
        chosen.append(parts.selection(gates, "test", {}))
    return chosen


@pytest.mark.parametrize(
    ("how", "tokens"),
    [
        pytest.param(how, tokens, marks=() if (how, tokens) in FAST else pytest.mark.slow)
        for how in GENERATION
        for tokens in (7, 10)
    ],
)
def test_ten_rows_with_ten_selections_are_ten_runs(tokens, how):
    model, settings = tiny_peft_model("llama"), GENERATION[how]
    chosen, inputs = selections(model), tiny_inputs("llama", rows=10, tokens=tokens)
    inputs["input_ids"][1, :3], inputs["attention_mask"][1, :3] = 0, 0  # padding on the left
    arguments = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **settings}
    with lorazor.kept(model, chosen, copies=settings["num_beams"]):
        together = model.generate(**inputs, **arguments)
    n = len(together) // 10
    for row, selection in enumerate(chosen):
        with lorazor.kept(model, selection):
            alone = model.generate(**{key: value[[row]] for key, value in inputs.items()}, **arguments)
        assert torch.equal(together[row * n : (row + 1) * n], alone)
    assert len({tuple(row) for row in together[:, tokens:].tolist()}) > 5  # the selections make a difference


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "opt", "gemma3", "t5", "bart"])
def test_other_families(family):
    model = tiny_peft_model(family)
    chosen, inputs = selections(model), tiny_inputs(family, rows=10, tokens=9)
    with lorazor.kept(model, chosen), torch.no_grad():
        together = model(**inputs).logits
    for row, selection in enumerate(chosen):
        with lorazor.kept(model, selection), torch.no_grad():
            alone = model(**{key: value[[row]] for key, value in inputs.items()}).logits
        torch.testing.assert_close(together[[row]], alone, rtol=1e-4, atol=1e-5)


def test_a_selection_computes_what_its_pruned_folder_computes(tmp_path, tiny):
    inputs = tiny_inputs("llama", rows=3, tokens=9)
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny.base), str(tiny.adapter)).eval()
    for index, selection in enumerate(selections(model)):
        if not selection.kept:
            continue
        selection.save(tmp_path / f"{index}.json")
        lorazor.prune(tiny.adapter, selection, out=tmp_path / str(index))
        base = LlamaForCausalLM.from_pretrained(tiny.base)
        with torch.no_grad():
            expected = PeftModel.from_pretrained(base, str(tmp_path / str(index))).eval()(**inputs).logits
            with lorazor.kept(model, tmp_path / f"{index}.json"):
                torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-5)


def test_everything_is_as_before_whatever_happens_inside():
    model = tiny_peft_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    chosen = selections(model)
    for some in (chosen[0], chosen):
        with pytest.raises(ZeroDivisionError), lorazor.kept(model, some):
            1 / 0  # noqa: B018
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert not any(module._forward_hooks for module in model.modules())


def test_what_is_dropped_is_not_computed():
    model = tiny_peft_model("llama")
    calls = []
    for site in lorazor.find_sites(model):
        site.module.lora_A["default"].register_forward_pre_hook(lambda *_: calls.append(1))
    nothing, inputs = selections(model)[3], tiny_inputs("llama", rows=2)
    with torch.no_grad(), model.disable_adapter():
        base = model(**inputs).logits
    for some in (nothing, [nothing, nothing]):
        with lorazor.kept(model, some), torch.no_grad():
            calls.clear()
            assert torch.equal(model(**inputs).logits, base)
        assert calls == []


def test_other_numbers_of_rows_are_refused_inside():
    model = tiny_peft_model("llama")
    chosen = selections(model)[:3]
    for rows in (2, 6):
        with lorazor.kept(model, chosen), pytest.raises(lorazor.LorazorError, match="rows"):
            model(**tiny_inputs("llama", rows=rows))
    with lorazor.kept(model, chosen, copies=2), torch.no_grad():
        model(**tiny_inputs("llama", rows=6))


def test_models_that_mix_rows_are_refused(monkeypatch):
    """A model whose attention looks at the rows above too."""
    model = tiny_peft_model("llama")
    layer: Any = model.get_base_model().model.layers[1]  # pyright: ignore[reportAttributeAccessIssue]
    layer.register_forward_pre_hook(lambda _, inputs: (inputs[0] + inputs[0].roll(1, 0), *inputs[1:]))
    with pytest.raises(lorazor.LorazorError, match="mixes"), lorazor.kept(model, selections(model)[:2]):
        pass


def test_selections_that_do_not_fit_are_refused(tmp_path: Path):
    model = tiny_peft_model("llama")
    other = selections(tiny_peft_model("llama", n_layers=2))[0]
    balanced = selections(model)[0]
    balanced = Selection(balanced.sites, "shrink by direction", {"basis": "balanced"})
    cases = ((other, "does not fit"), ([], "No selections"), (balanced, "of the run"), (tmp_path, "Cannot read"))
    for bad, message in cases:
        with pytest.raises(lorazor.LorazorError, match=message), lorazor.kept(model, bad):
            pass
