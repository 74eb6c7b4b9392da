"""Selections of mixtures of experts: what is trained from them, here and by other trainers, judged by stock PEFT."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from lorazor.adapter.sites import locate
from lorazor.data.examples import Example
from lorazor.errors import SelectionError, SettingsError
from lorazor.selection import SelectedSite, Selection
from lorazor.settings import FitSettings, LoraSettings, ModelSettings, TrainSettings
from lorazor.train.recipes import recipe
from lorazor.train.start import Start
from lorazor.workflow.train import train_adapter
from tests.data.test_batches import byte_tokenizer
from tests.tiny_mixtures import logits, tiny_mixture
from tests.tiny_models import randomise_b_
from tests.train.test_recipes import read

# PEFT 0.21 looks for patterns among modules alone; the ranks are those of the patterns nonetheless.
pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")

FAMILIES = ("mixtral", "gpt_oss")
LAYER = "model.layers.{}.".format
# PEFT gives gate_up twice the rank where it makes parameters of all-linear.
KEPT = {
    LAYER(0) + "mlp.experts.down_proj": 2,
    LAYER(0) + "mlp.experts.gate_up_proj": 4,
    LAYER(1) + "mlp.experts.gate_up_proj": 4,
    LAYER(1) + "self_attn.q_proj": 1,
}
DROPPED = {LAYER(1) + "mlp.experts.down_proj": 2, LAYER(0) + "self_attn.q_proj": 2}
ON_EXPERTS = {name: rank for name, rank in KEPT.items() if "experts" in name}


def selection_of(kept: Mapping[str, int], dropped: Mapping[str, int] = DROPPED) -> Selection:
    sites = []
    for name, rank in {**kept, **dropped}.items():
        stack, layer, kind = locate(name)
        sites.append(SelectedSite(name, layer, stack, kind, rank, name in kept, is_on_parameter="experts" in name))
    return Selection(tuple(sites), method="manual")


def trained(model: nn.Module) -> dict[str, tuple[int, float]]:
    """Rank and scaling by the name of the module or parameter; what else is trained has neither."""
    found: dict[str, Any] = {}
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    for name, module in base.named_modules():
        if isinstance(module, LoraLayer):
            if isinstance(module, ParamWrapper):
                name = f"{name.split('.base_layer')[0]}.{module.parameter_name}"
            found[name] = (
                len(module.lora_A["default"].weight) // getattr(module, "num_experts", 1),
                module.scaling["default"],
            )
    others = [name for name, one in base.named_parameters() if one.requires_grad and ".lora_" not in name]
    return found | dict.fromkeys(others)


@pytest.mark.parametrize("kept", [KEPT, ON_EXPERTS, {LAYER(1) + "self_attn.q_proj": 1}], ids=["both", "experts", "q"])
@pytest.mark.parametrize("style", ["peft", "axolotl"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_recipe_trains_exactly_the_kept_parameters(family, style, kept):
    model = get_peft_model(tiny_mixture(family), read(style, recipe(selection_of(kept), style, alpha=8)))
    assert trained(model) == {name: (rank, 8 / max(kept.values())) for name, rank in kept.items()}


@pytest.mark.parametrize(
    ("style", "message"),
    [
        ("llama-factory", r"no setting for LoRA on parameters, and 3 .* such as .*experts\.down_proj'.* style 'peft'"),
        ("unsloth", r"Unsloth changes target_parameters .* 3 of the kept sites"),
    ],
)
def test_a_trainer_that_cannot_be_told_parameters_is_refused(style, message):
    with pytest.raises(SelectionError, match=message):
        recipe(selection_of(KEPT), style, alpha=8)
    assert "experts" not in recipe(selection_of({LAYER(1) + "self_attn.q_proj": 1}), style, alpha=8)


def test_what_peft_has_not_for_parameters_is_refused():
    with pytest.raises(SettingsError, match=r"dropout=0\.1, but .*down_proj' is a parameter"):
        recipe(selection_of(KEPT), "peft", alpha=8, dropout=0.1)
    other = {f"text.{next(iter(KEPT))}": 2}  # PEFT would match it by its end
    with pytest.raises(SelectionError, match=r"would also train 'text\.model.*Keep or drop both\."):
        recipe(selection_of(KEPT, other), "peft", alpha=8)


@pytest.fixture(scope="module", params=FAMILIES)
def base(request, tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("mixture") / request.param
    tiny_mixture(request.param).save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    return base


def start(base: Path, **lora: Any) -> Start:
    return Start(ModelSettings(str(base)), LoraSettings(rank=2, alpha=3, **lora), 0, [Example(0, "a", "b", ("b",))])


@pytest.mark.parametrize("kept", [KEPT, ON_EXPERTS], ids=["both", "experts"])
def test_training_starts_on_exactly_the_kept_parameters(base, kept, tmp_path):
    """And what it saves is the same in stock PEFT. Selections of before do not say what is a parameter."""
    old = json.loads(selection_of(kept).to_json())
    for site in old["sites"]:
        site.pop("is_on_parameter", None)
    _, model = start(base).on_chosen(Selection.from_document(old))
    assert trained(model) == {name: (rank, 1.5) for name, rank in kept.items()}
    randomise_b_(model, seed=1)
    model.save_pretrained(tmp_path / "saved")
    stock = PeftModel.from_pretrained(tiny_mixture(base.name), tmp_path / "saved", is_trainable=True)
    assert trained(stock) == trained(model)
    expected = logits(model.eval())
    assert not torch.allclose(expected, logits(tiny_mixture(base.name)), atol=1e-2)
    torch.testing.assert_close(logits(stock.eval()), expected)


def test_the_first_loss_is_that_of_the_base_and_the_last_that_of_what_is_written(base, tmp_path):
    """One example, so that its loss at the answer can be computed by hand."""
    data, selection = tmp_path / "data.jsonl", tmp_path / "selection.json"
    data.write_text('{"prompt": "after 6:", "completion": "7"}\n')
    selection_of(KEPT).save(selection)
    settings = TrainSettings(
        model=ModelSettings(str(base)), batch_size=1, lora=LoraSettings(rank=2, alpha=3), selection=selection,
        fit=FitSettings(steps=3, learning_rate=0.05, rise_steps=1),
    )  # fmt: skip
    result = train_adapter(str(data), out=tmp_path / "run", settings=settings)
    tokenizer, family = byte_tokenizer(), base.name

    @torch.no_grad()
    def loss(model: nn.Module) -> float:
        prompt, answer = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("after 6:", "7"))
        answer = [*answer, tokenizer.eos_token_id]
        scores = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        return torch.nn.functional.cross_entropy(scores, torch.tensor(answer)).item()

    before, stock = tiny_mixture(family), PeftModel.from_pretrained(tiny_mixture(family), tmp_path / "run").eval()
    assert result.log[0]["loss"] == pytest.approx(loss(before), abs=1e-3)
    assert loss(stock) < result.log[-1]["loss"] < loss(before)
    assert {name: rank for name, (rank, _) in trained(stock).items()} == KEPT
    with pytest.raises(SettingsError, match=r"dropout=0\.1, but .* is a parameter"):
        start(base, dropout=0.1).on_chosen(selection_of(KEPT))


def test_what_peft_takes_for_another_parameter_is_refused(tmp_path):
    """Beside experts, PEFT takes dense layers for them by their names, and would train all experts instead."""
    from tests.adapter.test_translation_of_experts import mixture

    mixture("qwen3_moe").save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    with pytest.raises(SelectionError, match=r"exactly the kept sites: .*layers\.0\.mlp\.down_proj. would differ"):
        start(tmp_path / "base").on_chosen(selection_of({LAYER(0) + "mlp.down_proj": 2}, {}))
