"""The callback against the same training written by hand, and what a user sees of it."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Linear
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    LlamaForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer

from lorazor.adapter.sites import find_sites
from lorazor.errors import MeasureError, SettingsError
from lorazor.selection import Selection
from lorazor.train.callback import WeightLora
from tests.tiers import fast_first
from tests.tiny_models import tiny_inputs, tiny_model, tiny_peft_model
from tests.train.tiny_training import (
    N_LAYERS,
    N_SITES,
    Collator,
    Watch,
    arguments,
    logits_of,
    make_trainer,
    rows,
    tiny_llama,
    train_by_hand,
)


class GateRecord(TrainerCallback):
    """The gates after each optimizer step."""

    def __init__(self, callback):
        self.callback, self.path = callback, []

    def on_optimizer_step(self, *_, **__):
        self.path.append(self.callback._evidence.gated.gates.values.detach().clone())


def gates_of(folder, *, steps=6, model=None, keep=5, gate_lr=30.0, **kwargs):
    """The gates after each step of a training that is all warm-up, the trainer and the callback."""
    callback = WeightLora(keep, steps, schedule=kwargs.pop("schedule", "progressive"), gate_lr=gate_lr, dense_steps=2)
    record = GateRecord(callback)
    trainer = make_trainer(folder, model or tiny_llama(), callback, record, steps=steps, **kwargs)
    trainer.train()
    return torch.stack(record.path), trainer, callback


@pytest.mark.parametrize("accumulation", fast_first([1, 2], 2))
@pytest.mark.parametrize("schedule", ["progressive", "every-step"])
def test_the_gates_are_those_of_the_training_written_by_hand(tmp_path, schedule, accumulation):
    # a larger gate_lr makes rounding errors grow beyond 1e-5 within these steps
    settings = {"schedule": schedule, "gate_lr": 10.0, "gradient_accumulation_steps": accumulation}
    path, trainer, callback = gates_of(tmp_path, steps=10, **settings)
    budgets = [14, 14, *([5] * 8 if schedule == "every-step" else [12, 9, 8, 7, 6, 6, 6, 5])]
    by_hand = train_by_hand(tiny_llama(), trainer.data_collator.batches, budgets, accumulation, gate_lr=10.0)
    by_hand = torch.stack(list(by_hand))
    torch.testing.assert_close(path, by_hand, atol=1e-5, rtol=0)
    assert (path != 0).sum(1).tolist() == budgets
    assert (path[-1] - 1).abs().max() > 0.1  # they have learned
    # the clipped norm is that of A and B alone: the gates' gradient would show
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert norms[0] > 0.5
    chosen = {site.name: site.score for site in callback.selection.sites}
    names = [site.name for site in callback.selection.kept]
    assert sorted(chosen.values(), reverse=True)[:5] == sorted((chosen[name] for name in names), reverse=True)
    torch.testing.assert_close(torch.tensor(sorted(chosen.values())), by_hand[-1].abs().sort().values)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activations_that_are_computed_again_give_the_same_gates(tmp_path, use_reentrant):
    settings = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    expected, *_ = gates_of(tmp_path / "plain", steps=3)
    path, *_ = gates_of(tmp_path / "again", steps=3, **settings)
    torch.testing.assert_close(path, expected, atol=1e-5, rtol=0)


def test_autocast_gives_nearly_the_same_gates(tmp_path):
    expected, *_ = gates_of(tmp_path / "plain", steps=3)
    path, *_ = gates_of(tmp_path / "autocast", steps=3, bf16=True)
    moved = float((expected[0] - 1).abs().max())  # by the first gradient
    torch.testing.assert_close(path[0], expected[0], atol=0.05 * moved, rtol=0)
    assert path.dtype == torch.float32 and not torch.equal(path[0], expected[0])


def test_what_is_saved_at_any_time_computes_in_stock_peft_what_the_model_computes(tmp_path):
    watch = Watch({"on_save": logits_of})
    callback = WeightLora(4, 4, "every-step", gate_lr=30.0, dense_steps=1)
    trainer = make_trainer(tmp_path, tiny_llama(), callback, watch, steps=6, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    folders = [*(tmp_path / f"checkpoint-{step}" for step in range(1, 7)), tmp_path / "saved"]
    for folder, expected in zip(folders, [*watch.seen, watch.seen[-1]], strict=True):
        loaded = PeftModel.from_pretrained(tiny_model("llama", N_LAYERS), folder)
        torch.testing.assert_close(logits_of(loaded), expected, atol=1e-5, rtol=0)
    assert len(load_file(folders[2] / "adapter_model.safetensors")) == 2 * N_SITES
    kept = [site.name for site in callback.selection.kept]
    for folder in folders[3:]:
        assert json.loads((folder / "adapter_config.json").read_text())["target_modules"] == kept
        stems = {key.rsplit(".lora_", 1)[0] for key in load_file(folder / "adapter_model.safetensors")}
        assert stems == {f"base_model.model.{name}" for name in kept}


def with_embeddings():
    return tiny_llama(target_modules=["embed_tokens", "lm_head", "up_proj", "q_proj"])


def loaded_by_transformers():
    """An adapter without PeftModel, as `model.add_adapter` and `model.load_adapter` make it."""
    model = tiny_model("llama", N_LAYERS)
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "up_proj", "down_proj"], init_lora_weights=False))
    return model.train()


@pytest.mark.parametrize("make_model", [with_embeddings, loaded_by_transformers])
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_other_adapters_are_saved_as_they_compute(tmp_path, make_model):
    gated, watch = Watch({"on_optimizer_step": logits_of}), Watch({"on_step_end": logits_of})
    callback = WeightLora(2, 3, "progressive", gate_lr=30.0, dense_steps=1)
    model = make_model()
    make_trainer(tmp_path, model, callback, gated, watch, steps=4, save_strategy="steps", save_steps=1).train()
    torch.testing.assert_close(watch.seen[2], gated.seen[2], atol=1e-5, rtol=0)
    assert {site.name for site in find_sites(model)} == {site.name for site in callback.selection.kept}
    for step in (2, 4):
        loaded = PeftModel.from_pretrained(tiny_model("llama", N_LAYERS), tmp_path / f"checkpoint-{step}")
        torch.testing.assert_close(logits_of(loaded), watch.seen[step - 1], atol=1e-5, rtol=0)


def test_an_interrupted_warmup_can_be_saved(tmp_path):
    def interrupt(model):
        raise KeyboardInterrupt

    model = tiny_llama()
    callback = WeightLora(5, 4, "every-step", gate_lr=30.0, dense_steps=0)
    trainer = make_trainer(tmp_path, model, callback, Watch({"on_step_end": interrupt}))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(tiny_model("llama", N_LAYERS), tmp_path / "saved")
    torch.testing.assert_close(logits_of(loaded), logits_of(model), atol=1e-5, rtol=0)
    torch.testing.assert_close(logits_of(copy.deepcopy(model)), logits_of(model), atol=0, rtol=0)


def test_the_selection_names_all_sites_and_is_written_down(tmp_path):
    callback = WeightLora(5, 3, "progressive", dense_steps=1, seed=7)
    assert callback.selection is None
    trainer = make_trainer(tmp_path, tiny_llama(), callback, steps=4)
    trainer.train()
    selection = callback.selection
    assert Selection.load(tmp_path / "selection.json") == selection
    assert (selection.method, len(selection.sites), len(selection.kept)) == ("weightlora", N_SITES, 5)
    assert {site.weight for site in selection.sites} == {1.0}
    assert all((site.score > 0) == site.keep for site in selection.sites)
    assert selection.settings["keep"] == 5 and selection.provenance["seed"] == 7
    assert [site.name for site in selection.kept] == trainer.model.peft_config["default"].target_modules


class Reporter(TrainerCallback):
    """What TensorBoard and the like are given: they come before a user's callbacks."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs, **kwargs):
        self.logs.append(dict(logs))


def test_reporters_see_the_gates_in_the_trainers_own_log(tmp_path):
    reporter = Reporter()
    callback = WeightLora(5, 4, "progressive", dense_steps=1, gate_lr=30.0)
    trainer = make_trainer(tmp_path, tiny_llama(), reporter, callback, steps=7, logging_steps=3)
    trainer.train()
    names = ["gates_kept", "gate_min", "gate_max", "changes"]
    shown = [[log.get(f"lorazor/{name}") for name in names] for log in reporter.logs]
    assert [row[0] for row in shown] == [6, 5, None]  # in step 3, 6 (the outcome, once), and at the end
    kept = [site.score for site in callback.selection.kept]
    assert [abs(value) for value in shown[1][1:3]] == pytest.approx([min(kept), max(kept)])
    assert shown[1][3] >= N_SITES - 5
    history = [entry for entry in trainer.state.log_history if "lorazor/changes" in entry]
    assert [entry["lorazor/gates_kept"] for entry in history] == [6, 5]
    assert all("loss" in entry for entry in history)


def test_a_gate_that_is_not_a_number_stops_the_training_and_names_the_site(tmp_path):
    callback = WeightLora(5, 4, dense_steps=1)

    def break_gate(model):
        names = [site.name for site in callback._evidence.gated.sites]
        leaf = callback._evidence.gated._leaves[names.index("model.layers.1.mlp.up_proj")]
        leaf.register_hook(lambda gradient: gradient * float("nan"))

    trainer = make_trainer(tmp_path, tiny_llama(), callback, Watch({"on_step_begin": break_gate}))
    with pytest.raises(MeasureError, match=r"^model\.layers\.1\.mlp\.up_proj: The gate of site \d+ became nan"):
        trainer.train()


def test_kernels_that_bypass_the_modules_are_noticed(tmp_path, monkeypatch):
    """As Unsloth's do: A and B as matrices, PEFT's scaling as a number."""

    def forward(self, x, *_, **__):
        A, B = (one["default"].weight for one in (self.lora_A, self.lora_B))
        return self.base_layer(x) + self.scaling["default"] * (x @ A.T @ B.T)

    monkeypatch.setattr(Linear, "forward", forward)
    with pytest.raises(MeasureError, match="No gate got a gradient"):
        make_trainer(tmp_path, tiny_llama(), WeightLora(5, 4, dense_steps=1)).train()


class Stop(TrainerCallback):
    """Ends the training after two steps."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= 2
        return control


def test_a_training_that_ends_in_the_warmup_leaves_an_ordinary_adapter(tmp_path):
    model, watch = tiny_llama(), Watch({"on_step_end": logits_of})
    callback = WeightLora(5, 4, "every-step", gate_lr=30.0, dense_steps=1)
    trainer = make_trainer(tmp_path, model, callback, watch, Stop(), steps=6)
    with pytest.warns(UserWarning, match="ended in step 2 of a warm-up of 4"):
        trainer.train()
    assert callback.selection is None and not (tmp_path / "selection.json").exists()
    torch.testing.assert_close(logits_of(model), watch.seen[-1], atol=1e-5, rtol=0)
    trainer.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(tiny_model("llama", N_LAYERS), tmp_path / "saved")
    torch.testing.assert_close(logits_of(loaded), watch.seen[-1], atol=1e-5, rtol=0)


def test_the_best_model_is_one_of_those_after_the_cut(tmp_path):
    callback = WeightLora(5, 2, dense_steps=1)
    trainer = make_trainer(
        tmp_path,
        tiny_llama(),
        callback,
        steps=4,
        eval_dataset=rows(3),
        load_best_model_at_end=True,
        metric_for_best_model="samples_per_second",
        greater_is_better=None,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
    )
    values = iter([9, 8, 7, 6])  # the first evaluation, of all sites, is the best
    evaluate = trainer.evaluate
    trainer.evaluate = lambda **kwargs: {**evaluate(**kwargs), "eval_samples_per_second": next(values)}
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    loaded = PeftModel.from_pretrained(tiny_model("llama", N_LAYERS), tmp_path / "checkpoint-2")
    torch.testing.assert_close(logits_of(trainer.model), logits_of(loaded), atol=1e-6, rtol=0)


@pytest.mark.parametrize("by", ["site", "direction"])
def test_seq2seq_trainer(tmp_path, by):
    inputs = tiny_inputs("bart", rows=8)
    data = [
        {"input_ids": source.tolist(), "labels": target.tolist()}
        for source, target in zip(inputs["input_ids"], inputs["decoder_input_ids"], strict=True)
    ]
    model = tiny_peft_model("bart", 1, rank=2)
    args = arguments(tmp_path, 3, Seq2SeqTrainingArguments)
    callback = WeightLora(keep=3, select_steps=2, dense_steps=1, by=by)
    Seq2SeqTrainer(model=model, args=args, train_dataset=data, data_collator=Collator(), callbacks=[callback]).train()
    assert sum(one.kept_rank for one in callback.selection.kept) == (3 if by == "direction" else 6)
    assert model.peft_config["default"].target_modules == [one.name for one in callback.selection.kept]
    model.save_pretrained(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(tiny_model("bart", 1), tmp_path / "saved")
    torch.testing.assert_close(loaded(**inputs).logits, model.eval()(**inputs).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("by", ["site", "direction"])
def test_sft_trainer(tiny, tmp_path, by):
    """TRL's defaults: activation checkpointing on, its own log and loss, and a PeftModel that the trainer makes."""
    data = [json.loads(line) for line in tiny.validation.read_text().splitlines()]
    reporter, callback = Reporter(), WeightLora(keep=3, select_steps=3, dense_steps=2, by=by)
    trainer = SFTTrainer(
        model=LlamaForCausalLM.from_pretrained(tiny.base),
        args=arguments(tmp_path, 4, SFTConfig, bf16=False, activation_checkpointing=True, max_length=None),
        train_dataset=Dataset.from_list(data),
        processing_class=AutoTokenizer.from_pretrained(tiny.base),
        peft_config=LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[reporter, callback],
    )
    trainer.train()
    n_gates = [28, 28, 3] if by == "site" else [None] * 3
    assert [log.get("lorazor/gates_kept") for log in reporter.logs] == [*n_gates, None, None]
    assert sum(one.kept_rank for one in callback.selection.kept) == (3 if by == "direction" else 6)
    assert all("mean_token_accuracy" in log for log in reporter.logs[:4])
    trainer.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny.base), tmp_path / "saved")
    torch.testing.assert_close(logits_of(loaded), logits_of(trainer.model), atol=1e-5, rtol=0)


@pytest.mark.parametrize("lora", [{}, {"target_modules": ["embed_tokens", "q_proj"]}], ids=["linear", "embedding"])
def test_merging_in_the_warmup_merges_what_the_model_computes(tmp_path, lora):
    """As a trainer does that hands its weights to a server, or someone after Ctrl-C."""
    model = tiny_llama(**lora)
    record = []

    def merge(_):
        before = logits_of(model)
        if lora:
            with pytest.raises(SettingsError, match="embed_tokens cannot be merged while gates are on it"):
                model.merge_adapter()
            raise KeyboardInterrupt
        model.merge_adapter()
        record.append((before, logits_of(model)))
        model.unmerge_adapter()
        record.append((before, logits_of(model)))
        if len(record) == 6:
            raise KeyboardInterrupt

    trainer = make_trainer(tmp_path, model, WeightLora(1, 4, gate_lr=30.0), Watch({"on_step_end": merge}))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    for before, after in record:
        torch.testing.assert_close(after, before, atol=1e-5, rtol=0)
    if not lora:
        before = logits_of(model)
        torch.testing.assert_close(logits_of(model.merge_and_unload()), before, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kwargs", [{"learning_rate": 0.0}, {}], ids=["no rate", "one step"])
def test_a_choice_without_evidence_is_refused(tmp_path, kwargs):
    model = tiny_llama()
    for site in find_sites(model):
        torch.nn.init.zeros_(site.module.lora_B["default"].weight)
    callback = WeightLora(3, 1 if not kwargs else 3)
    with pytest.raises(MeasureError, match="showed nothing: gate is 1 for all 14 sites.*Pass more select_steps"):
        make_trainer(tmp_path, model, callback, **kwargs).train()
