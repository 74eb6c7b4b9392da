"""Shrink from start to end: what is written is what was measured, and what cannot work is said at once."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lorazor.errors import (
    AdapterError,
    BudgetError,
    DataError,
    MeasureError,
    OutputError,
    SelectionError,
    SettingsError,
)
from lorazor.selection import Selection
from lorazor.settings import DataSettings, GenerationSettings, ModelSettings, ShrinkSettings
from lorazor.workflow.prune import prune
from lorazor.workflow.shrink import ShrinkResult, shrink
from lorazor.workflow.written import Writer
from tests.tiny_folders import make_folders, write_rows
from tests.workflow.planted import WEIGHTS, Planted, change, plant
from tests.workflow.shrinking import READING, rows, run, run_losses, stock_losses

_FAST = (("rslora", "fisher"), ("dora", "credit"))
FORMS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "alpha": {"alpha_pattern": {"q_proj": 3, "down_proj": 20}},
    "ranks": {"rank_pattern": {"q_proj": 2, "up_proj": 6}, "alpha_pattern": {"up_proj": 5}},
    "head": {"target_modules": ["q_proj", "down_proj", "lm_head"]},
    "embedding": {"target_modules": ["q_proj", "down_proj", "embed_tokens"]},
    "dora": {"use_dora": True},
}


@pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers.:UserWarning")  # PEFT, as it saves the embedding
@pytest.mark.parametrize(
    ("form", "score"),
    [
        pytest.param(form, score, marks=[] if (form, score) in _FAST else pytest.mark.slow)
        for form in FORMS
        for score in ("credit", "balanced", "fisher")
    ],
)
def test_the_folder_in_stock_peft_has_the_losses_of_the_run(tmp_path, form, score):
    if (score, form) in (("balanced", "dora"), ("balanced", "head"), ("fisher", "dora")):
        return  # tried with credit
    folders = make_folders(tmp_path, **FORMS[form])
    one = plant(folders.base, folders.adapter, tmp_path)
    if score == "balanced" and form == "embedding":
        with pytest.raises(SettingsError, match="'balanced' knows nothing of .*embed_tokens"):
            run(one, tmp_path / "run", params_fraction=0.4, score=score)
        assert not (tmp_path / "run").exists()
        return
    by = {"by": "site"} if form == "dora" else {}
    result = run(one, tmp_path / "run", params_fraction=0.4, score=score, confirm=True, **by)
    assert result.pruned is not None and result.pruned.n_parameters_kept <= 0.4 * result.pruned.n_parameters
    for prefix, data in (("", one.data), ("confirm-", one.held_out)):
        expected = stock_losses(folders.base, tmp_path / "run" / "adapter", data)
        assert run_losses(tmp_path / "run", prefix) == pytest.approx(expected, abs=1e-4)
    assert result.loaded_differs_by is not None and result.loaded_differs_by < 1e-4
    assert json.loads((tmp_path / "run" / "shrink.json").read_text())["loaded_differs_by"] == result.loaded_differs_by


@pytest.mark.slow
def test_a_folder_that_computes_something_else_is_found_out(gaining, out, monkeypatch):
    """As pruning would leave it with a wrong factor."""
    write = Writer.write

    def wrong(self, *arguments, **options):
        pruned = write(self, *arguments, **options)
        tensors = load_file(pruned.path / WEIGHTS)
        scaled = {key: tensor * (1.5 if "lora_B" in key else 1) for key, tensor in tensors.items()}
        save_file(scaled, pruned.path / WEIGHTS, metadata={"format": "pt"})
        return pruned

    monkeypatch.setattr(Writer, "write", wrong)
    with pytest.raises(MeasureError, match="other losses in PEFT than were measured"):
        run(gaining, out, params_fraction=0.5)
    assert not json.loads((out / "run.json").read_text())["finished"]


def test_a_classifier_keeps_its_head(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification, set_seed

    from tests.workflow.test_tasks import SIZES, save

    set_seed(0)
    config = BertConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_labels=3, **SIZES
    )
    texts = [{"text": f"number {n}", "label": n % 3} for n in range(9)]
    adapter, data = save(
        tmp_path, BertForSequenceClassification(config), texts, target_modules=["query", "value"], task_type="SEQ_CLS"
    )
    result = shrink(
        adapter, str(data), out=tmp_path / "run", settings=ShrinkSettings(params_fraction=0.5, score="balanced")
    )
    assert result.pruned is not None and result.metric == "accuracy"
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    model: Any = PeftModel.from_pretrained(base, result.pruned.path).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    measured = run_losses(tmp_path / "run")
    for index, row in enumerate(texts):
        with torch.no_grad():
            logits = model(**tokenizer(row["text"], return_tensors="pt")).logits
        assert measured[index] == pytest.approx(float(cross_entropy(logits, torch.tensor([row["label"]]))), abs=1e-4)


def test_a_margin_and_its_verdict(gaining, out):
    result = run(gaining, out, confirm=True, margin="40%")
    document = json.loads((out / "shrink.json").read_text())
    assert result.pruned is not None and result.verdict is not None
    full, base = stock_losses_of_full(gaining, out)
    assert document["margin"] == pytest.approx(0.4 * (base - full), abs=1e-5)
    assert document["verdict"]["outcome"] == result.verdict.outcome
    assert "held" not in result.verdict.sentence.replace("held-out", "")
    assert result.verdict.sentence in (out / "adapter" / "README.md").read_text()


def stock_losses_of_full(one: Planted, out: Path) -> tuple[float, float]:
    """Losses of full adapter and base on the validation examples, per answer token."""
    config = json.loads((one.adapter / "adapter_config.json").read_text())
    base = Path(config["base_model_name_or_path"])
    off = change(one.adapter, out.parent / "off", lambda site, A, B: (A, 0 * B))
    n_tokens = sum(row["n_tokens"] for row in rows(out / "losses.jsonl") if row["adapter"] == "full")
    full, zero = (sum(stock_losses(base, adapter, one.data).values()) / n_tokens for adapter in (one.adapter, off))
    return full, zero


@pytest.mark.parametrize(
    ("goal", "check"),
    [
        ({"margin": "loss=0.2"}, lambda r: r.metric == "loss"),
        ({"params": 4000}, lambda r: r.pruned.n_parameters_kept <= 4000),
        ({"size": "20KB"}, lambda r: r.pruned.n_bytes <= 20_000),
        ({"max_rank": 2}, lambda r: max(ranks(r)) <= 2),
        ({"max_rank": 2, "uniform": True}, lambda r: set(ranks(r)) == {2} and len(ranks(r)) == 28),
        (
            {"margin": "rougeL=60", "by": "layer", "generation": GenerationSettings(max_new_tokens=4)},
            lambda r: r.metric == "rougeL",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_goals(gaining, out, goal, check):
    assert check(run(gaining, out, **goal))


def ranks(result: ShrinkResult) -> list[int]:
    return [site.kept_rank for site in Selection.load(result.out / "selection.json").kept]


@pytest.mark.parametrize("goal", [{"params_fraction": 1.0}, {"max_rank": 4, "uniform": True}, {"margin": "loss=1e-9"}])
def test_where_nothing_is_dropped_there_is_no_verdict_and_no_adapter(gaining, out, goal):
    result = run(gaining, out, confirm=True, by="direction" if "max_rank" in goal else "layer", **goal)
    if result.pruned is None:
        assert result.loaded_differs_by is None and "Nothing is dropped" in result.reason
        assert not (out / "adapter").exists()
        assert result.verdict is None or "margin" in goal
    else:
        assert goal == {"params_fraction": 1.0}  # a layer of negative credit goes, whatever the room


def test_an_adapter_that_gains_nothing_is_said_before_the_search(tiny, out, tmp_path):
    harmful = Planted(tiny.adapter, str(tiny.validation), str(tiny.held_out))
    with pytest.raises(MeasureError, match="gains nothing over its base model"):
        run(harmful, out)
    assert not (out / "scores.jsonl").exists()
    with pytest.raises(MeasureError, match="a size or a boundary without --confirm"):
        run(harmful, tmp_path / "sized", confirm=True, params_fraction=0.5)
    assert run(harmful, tmp_path / "unjudged", params_fraction=0.5).pruned is not None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_weights_are_refused_before_the_model_is_loaded(gaining, out, monkeypatch, bad):
    monkeypatch.setattr("lorazor.workflow.opening.load", lambda *_: pytest.fail("the model was loaded"))

    def edit(site, A, B):
        return A, B * (bad if site.endswith("layers.1.mlp.up_proj") else 1)

    other = change(gaining.adapter, out.parent / "nan", edit)
    with pytest.raises(AdapterError, match=r"layers.1.mlp.up_proj.lora_B.* holds NaN or infinite numbers"):
        run(dataclasses.replace(gaining, adapter=other), out)
    assert not out.exists()


@pytest.mark.parametrize("what", ["the confirmation data", "its prompts with other answers", "the validation data"])
def test_healing_on_what_judges_is_refused(gaining, out, tmp_path, monkeypatch, what):
    monkeypatch.setattr("lorazor.workflow.opening.load", lambda *_: pytest.fail("the model was loaded"))
    source = gaining.data if what == "the validation data" else gaining.held_out
    if what == "its prompts with other answers":
        pairs = [{"prompt": f"new {n}", "completion": "yes"} for n in range(8)]
        pairs += [one | {"completion": "no"} for one in rows(Path(source))[:2]]
        source = str(tmp_path / "train.jsonl")
        Path(source).write_text("".join(json.dumps(one) + "\n" for one in pairs))
    with pytest.raises(SettingsError, match="of --heal .* have a prompt that is also in --(data|confirm)"):
        run(gaining, out, confirm=True, heal=source, params_fraction=0.5)
    assert not out.exists()


@pytest.mark.parametrize(("set_", "n"), [("--data", 50), ("--confirm", 50), ("--data", 1), ("--confirm", 1)])
def test_a_margin_that_nothing_can_decide_is_refused(gaining, out, tmp_path, monkeypatch, set_, n):
    """0.95^59 is the first power below 0.05: so many answers that all stay show 5 %."""
    monkeypatch.setattr("lorazor.workflow.opening.load", lambda *_: pytest.fail("the model was loaded"))
    files = {"--data": range(100, 160), "--confirm": range(200, 260)}
    for name, numbers in files.items():
        kept = numbers[:n] if name == set_ else numbers
        text = "".join(json.dumps({"text": f"number {one}", "label": one % 2}) + "\n" for one in kept)
        (tmp_path / f"{name}.jsonl").write_text(text)
    message = f"1 prompt in {set_}" if n == 1 else f"the 50 different prompts of {set_}, .* Pass 59 or more"
    with pytest.raises(SettingsError, match=message):
        shrink(
            gaining.adapter, str(tmp_path / "--data.jsonl"), out=out, confirm=str(tmp_path / "--confirm.jsonl"),
            settings=ShrinkSettings(margin="accuracy=0.05"),
        )  # fmt: skip
    assert not out.exists()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"margin": "2%", "params": 9}, SettingsError, "pass one goal"),
        ({"max_rank": 9}, BudgetError, "max_rank=9, but the sites have ranks up to 4"),
        ({"uniform": True}, SettingsError, "uniform goes with max_rank"),
        ({"size": "1KB"}, BudgetError, "size=1KB"),
        ({"size": "big"}, BudgetError, "size='big'"),
        ({"params_fraction": 1.5}, BudgetError, "params_fraction=1.5"),
        ({"energy": 0.9}, SettingsError, "energy"),
        ({"margin": "blue=1"}, SettingsError, "'blue' is unknown"),
        ({"margin": "accuracy=0.1"}, SettingsError, "needs labels"),
        ({"by": "colour"}, SettingsError, "by='colour'"),
        ({"stack": "model.layers"}, SettingsError, "belongs to --by prefix"),
        ({"heal": "{train}", "heal_steps": 0}, SettingsError, "heal_steps=0"),
        ({"heal": "{train}", "heal_accumulation": 3}, SettingsError, "heal_accumulation=3 passes cannot share"),
        ({"heal": "{train}", "heal_accumulation": 0}, SettingsError, "heal_accumulation=0"),
        ({"heal": "{train}", "reading": DataSettings(batch_size=99)}, DataError, "a step of healing reads 99"),
    ],
)
def test_bad_settings_are_refused_before_the_model_is_loaded(
    gaining, train, out, monkeypatch, settings, error, message
):
    monkeypatch.setattr("lorazor.workflow.opening.load", lambda *_: pytest.fail("the model was loaded"))
    settings = {key: train if value == "{train}" else value for key, value in settings.items()}
    with pytest.raises(error, match=message):
        run(gaining, out, **settings)
    assert not out.exists()


def test_without_data(gaining, train, out):
    for settings, message in (({}, "A margin is measured"), ({"energy": 0.9, "score": "credit"}, "looks at examples")):
        with pytest.raises(SettingsError, match=message):
            shrink(gaining.adapter, out=out, settings=ShrinkSettings(**settings))
    with pytest.raises(SettingsError, match="--heal without --data"):
        shrink(gaining.adapter, out=out, settings=ShrinkSettings(energy=0.9, heal=train))
    assert not out.exists()
    result = shrink(gaining.adapter, out=out, settings=ShrinkSettings(max_rank=2))
    assert "Nothing was measured" in result.reason and max(ranks(result)) == 2


def test_an_output_folder_that_holds_something_is_not_touched(gaining, out):
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="not empty"):
        run(gaining, out)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def test_the_selection_of_a_run_is_applied_in_its_basis(gaining, out, tmp_path):
    """By `prune`, the same bytes; away from its run, its directions mean nothing, and that is said."""
    run(gaining, out, params_fraction=0.3)
    prune(gaining.adapter, out / "selection.json", out=tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (out / "adapter" / WEIGHTS).read_bytes()
    shutil.copy(out / "selection.json", tmp_path / "alone.json")
    with pytest.raises(SelectionError, match="not the singular ones"):
        prune(gaining.adapter, tmp_path / "alone.json", out=tmp_path / "other")


# Healing


def test_another_split_of_rows(gaining, out, tmp_path):
    """A run on other data is another run."""
    run(gaining, out, params_fraction=0.5)
    other = write_rows(tmp_path / "other.jsonl", range(60, 66))
    with pytest.raises(OutputError, match="another run"):
        shrink(
            gaining.adapter, str(other), out=out, resume=True,
            settings=ShrinkSettings(reading=READING, points=2, params_fraction=0.5),
        )  # fmt: skip


@pytest.mark.parametrize("what", ["the scaling of the adapter", "the base model"])
def test_another_model_under_the_same_name_is_another_run(tiny, gaining, out, tmp_path, what):
    base, adapter = shutil.copytree(tiny.base, tmp_path / "base"), shutil.copytree(gaining.adapter, tmp_path / "ad")
    settings = ShrinkSettings(reading=READING, points=2, params_fraction=0.5, model=ModelSettings(str(base)))
    shrink(adapter, gaining.data, out=out, settings=settings)
    if what == "the base model":
        tensors = load_file(base / "model.safetensors")
        tensors["model.layers.1.self_attn.q_proj.weight"] *= 2
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
        message = "the weights of the base model '.*' have changed"
    else:
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 2 * config["lora_alpha"]}))
        message = "the contents of adapter have changed"
    with pytest.raises(OutputError, match=message):
        shrink(adapter, gaining.data, out=out, settings=settings, resume=True)
