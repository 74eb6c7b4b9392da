"""Shrinking a model in memory: it stays as it was, and what comes out is what its folder would give."""

from __future__ import annotations

import copy
import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import lorazor
from lorazor.errors import AdapterError, DataError, OutputError, SettingsError
from tests.workflow.planted import WEIGHTS
from tests.workflow.shrinking import READING, run

IDS = torch.arange(5, 25)[None]
QUICK: dict[str, Any] = {"points": 1, "reading": READING}


def live(base: Path, adapter: Path) -> Any:
    """As a training leaves it: in training mode, with gradients on A and B."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter, is_trainable=True)
    return model.train()


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that a user can see of a model, and which objects it consists of."""
    config: Any = model.config
    return {
        "modules": [(name, id(module), module.training) for name, module in model.named_modules()],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        "parameters": [(name, id(one), one.requires_grad) for name, one in model.named_parameters()],
        "numbers": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "config": copy.deepcopy(config.to_dict()),
        "peft": copy.deepcopy({name: one.to_dict() for name, one in model.peft_config.items()}),  # pyright: ignore
    }


def check_is_as_before(model: nn.Module, before: dict[str, Any]) -> None:
    now = state_of(model)
    numbers, was = now.pop("numbers"), before.pop("numbers")
    assert now == before and numbers.keys() == was.keys()
    assert all(torch.equal(numbers[name], tensor) for name, tensor in was.items())


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("heal_from", ["labels", pytest.param("full", marks=pytest.mark.slow)])
def test_the_model_stays_as_it_was_and_the_result_is_that_of_its_folder(tiny, gaining, train, tmp_path, heal_from):
    """Healed on examples in memory; the same numbers as from folder and files, and as stock PEFT loads them."""
    model = live(tiny.base, gaining.adapter)
    before, seen = state_of(model), logits(model)
    examples = {name: lorazor.read_examples(one) for name, one in (("data", gaining.data), ("train", train))}
    healing: dict[str, Any] = {"heal_steps": 6, "heal_lr": 5e-3, "heal_from": heal_from}
    settings = {**QUICK, **healing, "params_fraction": 0.2}
    result = lorazor.shrink(
        model, examples["data"], confirm=gaining.held_out, heal=examples["train"], **settings,
        tokenizer=AutoTokenizer.from_pretrained(tiny.base),
    )  # fmt: skip
    check_is_as_before(model, before)
    assert torch.equal(logits(model), seen)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(one.grad is not None for name, one in model.named_parameters() if "lora_" in name)

    assert result.pruned is not None and isinstance(result.model, PeftModel) and result.verdict is not None
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny.base), result.pruned.path).eval()
    torch.testing.assert_close(logits(result.model), logits(stock), atol=1e-6, rtol=0)
    own = {name.replace(".base_layer", ""): one for name, one in result.model.named_parameters()}
    for name, parameter in model.named_parameters():
        if "lora_" not in name:  # the base weights are not held twice
            assert own[name.replace(".base_layer", "")].data_ptr() == parameter.data_ptr()
    folder = run(gaining, tmp_path / "folder", confirm=True, heal=train, **settings)
    assert folder.pruned is not None
    expected, found = (load_file(one.pruned.path / WEIGHTS) for one in (folder, result))  # pyright: ignore
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=0)
    assert result.out.is_dir() and json.loads((result.out / "run.json").read_text())["finished"]
    shutil.rmtree(result.out)


def test_three_lines_with_nothing_but_a_margin(tiny, gaining):
    model = live(tiny.base, gaining.adapter)
    before = state_of(model)
    result = lorazor.shrink(model, gaining.data, margin="40%", **QUICK)
    check_is_as_before(model, before)
    assert "40 % of the gain" in result.goal and result.cost is not None and result.cost.scoring > 0
    assert (result.model is None) == (result.pruned is None)
    shutil.rmtree(result.out)


def test_the_weights_of_a_model_in_memory_alone(tiny, gaining, out):
    model = live(tiny.base, gaining.adapter)
    before = state_of(model)
    result = lorazor.shrink(model, out=out, max_rank=2)
    check_is_as_before(model, before)
    assert result.model is None and result.pruned is not None and result.pruned.ranks == (2, 2)


@pytest.mark.slow
def test_a_classifier_in_memory_keeps_its_trained_head(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification, set_seed

    from tests.data.test_batches import byte_tokenizer
    from tests.tiny_models import randomise_b_
    from tests.workflow.test_tasks import SIZES

    set_seed(0)
    config = BertConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_labels=3, **SIZES
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path / "base")
    tokenizer = byte_tokenizer(None)
    base = BertForSequenceClassification.from_pretrained(tmp_path / "base")
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"], task_type="SEQ_CLS")
    model: Any = get_peft_model(base, lora)
    randomise_b_(model)
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight.normal_()
    model.eval()
    before, seen = state_of(model), logits(model)
    examples = [lorazor.Example(0, f"number {n}", "", (), n % 3) for n in range(9)]
    result = lorazor.shrink(
        model, examples, tokenizer=tokenizer, out=tmp_path / "out", params_fraction=0.5, score="balanced", **QUICK
    )
    check_is_as_before(model, before)
    assert torch.equal(logits(model), seen) and result.pruned is not None and result.metric == "accuracy"
    fresh = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    stock = PeftModel.from_pretrained(fresh, result.pruned.path).eval()
    torch.testing.assert_close(logits(result.model), logits(stock), atol=1e-6, rtol=0)
    assert not torch.allclose(logits(result.model), seen)


def test_what_cannot_work_is_said(tiny, gaining, out):
    model = live(tiny.base, gaining.adapter)
    tokenizer = AutoTokenizer.from_pretrained(tiny.base)
    refusals: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        (model, {"marign": "2%"}, SettingsError, "'marign' is no field of ShrinkSettings. Pass some of by, energy"),
        (model, {"model": lorazor.ShrinkSettings().model.__class__(dtype="bfloat16")}, SettingsError, "has its base"),
        (nn.DataParallel(model), {}, SettingsError, "DataParallel is no adapter"),
        (gaining.adapter, {"tokenizer": tokenizer}, SettingsError, "tokenizer goes with a model in memory"),
        (model, {"confirm": lorazor.read_examples(gaining.data)}, SettingsError, "of --confirm '8 examples in memory"),
    ]
    for one, fields, error, message in refusals:
        with pytest.raises(error, match=message):
            lorazor.shrink(one, gaining.data, out=out, **fields)
    with pytest.raises(DataError, match="no examples in memory"):
        lorazor.shrink(model, [], out=out)
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="not empty"):
        lorazor.shrink(model, gaining.data, out=out)
    model.merge_adapter()
    with pytest.raises(AdapterError, match="is merged into its base weight"):
        lorazor.shrink(model, gaining.data)


def test_every_command_takes_a_model_and_examples_in_memory(tiny, tmp_path):
    """The same numbers as from folder and files, and the model stays as it was."""
    model, tokenizer = live(tiny.base, tiny.adapter), AutoTokenizer.from_pretrained(tiny.base)
    before, examples = state_of(model), lorazor.read_examples(str(tiny.validation))
    sources = {"a": (tiny.adapter, str(tiny.validation), {}), "b": (model, examples, {"tokenizer": tokenizer})}
    found: dict[str, list[Any]] = {}
    for name, (adapter, data, more) in sources.items():
        place = tmp_path / name
        boundary = lorazor.find_boundary(adapter, data, out=place / "boundary", reading=READING, **more)
        curves = lorazor.measure_curves(adapter, data, out=place / "curves", reading=READING, **more)
        results = lorazor.evaluate([adapter], data, out=place / "eval", base=True, reading=READING, **more).results
        pruned = lorazor.prune(adapter, out=place / "pruned", boundary=2)
        found[name] = [
            *(one.value for one in boundary.choice.candidates), *(one.probability for one in curves.curves),
            *(one.value for one in results), *(one.norm for one in lorazor.inspect(adapter).sites),
            *(tensor.norm().item() for tensor in load_file(pruned.path / WEIGHTS).values()),
        ]  # fmt: skip
    assert found["b"] == pytest.approx(found["a"], abs=1e-5) and len(found["a"]) > 40
    check_is_as_before(model, before)
    written = json.loads((tmp_path / "b" / "eval" / "run.json").read_text())
    assert written["settings"]["adapters"] == ["a model in memory", "base"]
    with pytest.raises(OutputError, match="data was '[0-9]+ examples in memory"):
        lorazor.find_boundary(
            model, examples[:-1], out=tmp_path / "b" / "boundary", reading=READING, tokenizer=tokenizer, resume=True
        )


def test_the_base_of_a_model_in_memory_has_its_own_head(tmp_path):
    """Against PEFT's own `disable_adapter`: a trained head goes with the adapter."""
    from transformers import BertConfig, BertForSequenceClassification, set_seed

    from tests.workflow.test_tasks import SIZES, save

    set_seed(0)
    config = BertConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_labels=3,
        initializer_range=0.5, **SIZES,
    )  # fmt: skip
    texts = [{"text": f"number {n}", "label": n % 3} for n in range(9)]
    adapter, data = save(
        tmp_path, BertForSequenceClassification(config), texts, target_modules=["query", "value"], task_type="SEQ_CLS"
    )
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    model: Any = PeftModel.from_pretrained(base, adapter).eval()
    with torch.no_grad():
        for head in (one for name, one in model.named_parameters() if "modules_to_save" in name):
            head.add_(1.0 * torch.randn(head.shape))
    tokenizer, expected = AutoTokenizer.from_pretrained(tmp_path / "base"), []
    for is_base in (False, True):
        with torch.no_grad(), model.disable_adapter() if is_base else nullcontext():
            ids = [torch.tensor([tokenizer(one["text"])["input_ids"]]) for one in texts]
            logits = torch.cat([model(input_ids=one).logits for one in ids])
        labels = torch.tensor([one["label"] for one in texts])
        expected.append(nn.functional.cross_entropy(logits, labels).item())
    results = lorazor.evaluate(model, str(data), out=tmp_path / "run", base=True, tokenizer=tokenizer).results
    assert [one.value for one in results] == pytest.approx(expected, abs=1e-5)
    assert abs(expected[0] - expected[1]) > 0.1


def test_what_a_saved_adapter_would_not_say_is_refused(tiny, tmp_path):
    model, tokenizer = live(tiny.base, tiny.adapter), AutoTokenizer.from_pretrained(tiny.base)
    more: dict[str, Any] = {"tokenizer": tokenizer, "reading": READING}
    lorazor.evaluate(model, str(tiny.validation), out=tmp_path / "run", **more)
    other = live(tiny.base, tiny.adapter)
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(2)
    with pytest.raises(OutputError, match="holds another run: in_memory"):  # same adapter, other base weights
        lorazor.evaluate(other, str(tiny.validation), out=tmp_path / "run", resume=True, **more)
    model.base_model.disable_adapter_layers()
    with pytest.raises(AdapterError, match="is switched off"):
        lorazor.evaluate(model, str(tiny.validation), out=tmp_path / "off", **more)
    layer = next(one for one in other.modules() if hasattr(one, "scale_layer"))
    layer.scale_layer(0.25)
    with pytest.raises(AdapterError, match="in memory, by .* as it is saved"):
        lorazor.evaluate(other, str(tiny.validation), out=tmp_path / "scaled", **more)
    for bad in ([{"prompt": "a", "completion": "b"}], [lorazor.Example(0, None, "b", ())], 3):  # pyright: ignore
        with pytest.raises(DataError):
            lorazor.evaluate(tiny.adapter, bad, out=tmp_path / "bad")  # pyright: ignore[reportArgumentType]
    with pytest.raises(SettingsError, match="Pass EvalSettings"):
        lorazor.evaluate(tiny.adapter, "x", out=tmp_path / "bad", settings=lorazor.PruneSettings())  # pyright: ignore
