"""Everything that would go wrong silently is refused before the first step."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import Trainer, TrainerCallback

from lorazor.errors import AdapterError, BudgetError, OutputError, SettingsError, UnsupportedAdapterError
from lorazor.select.weightlora import WeightLoraSettings
from lorazor.train import preconditions
from lorazor.train.callback import WeightLora
from lorazor.train.preconditions import check_arguments, check_in_place
from tests.tiny_models import tiny_model
from tests.train.tiny_training import Collator, arguments, make_trainer, rows, tiny_llama


class NoStep(TrainerCallback):
    """No step may be taken."""

    def on_step_begin(self, *_, **__):
        raise AssertionError("a step has begun")


def refuse(folder, error, message, *callbacks, model=None, **kwargs):
    model = model or tiny_llama()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = make_trainer(folder, model, NoStep(), *callbacks, **kwargs)
    with pytest.raises(error, match=message):
        trainer.train()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"keep": 15}, BudgetError, r"keep=15 sites, but the model has 14 LoRA sites\. Pass a whole number, 1\.\.14"),
        ({"keep": 0}, BudgetError, r"keep=0 sites"),
        ({"select_steps": 7}, SettingsError, r"select_steps=7 is more than the 6 steps of the training"),
        ({"schedule": "progressive", "dense_steps": 4}, SettingsError, r"dense_steps=4"),
        ({"schedule": "linear"}, SettingsError, r"schedule='linear'"),
        ({"gate_lr": 0.0}, SettingsError, r"gate_lr=0\.0"),
        ({"grow": True}, SettingsError, r"grow=True is unknown\. Pass None, or one of served, paper"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, changes, error, message):
    settings = {"keep": 5, "select_steps": 4, "dense_steps": 1, **changes}
    refuse(tmp_path, error, message, WeightLora(**settings))


def merged():
    model = tiny_llama()
    model.merge_adapter()
    return model


def scaled():
    model = tiny_llama()
    model.get_submodule("base_model.model.model.layers.0.mlp.up_proj").set_scale("default", 0.5)
    return model


def with_two_adapters():
    model = tiny_llama()
    model.add_adapter("other", LoraConfig(target_modules=["v_proj"], task_type="CAUSAL_LM"))
    return model


def hooked():
    model = tiny_llama()
    model.get_submodule("base_model.model.model.layers.0.mlp.up_proj").register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize(
    ("make_model", "error", "message"),
    [
        (lambda: tiny_model("llama", 1), AdapterError, r"has no PEFT adapter"),
        (lambda: tiny_llama(use_dora=True), UnsupportedAdapterError, r"use_dora"),
        (merged, AdapterError, r"is merged into its base weight\. Call unmerge_adapter"),
        (scaled, AdapterError, r"up_proj is scaled by 1\.0, but its adapter says 2\.0"),
        (with_two_adapters, AdapterError, r"has the adapters default, other\. Delete"),
        (hooked, AdapterError, r"up_proj has a forward hook"),
        (lambda: tiny_llama(ensure_weight_tying=True), UnsupportedAdapterError, r"ensure_weight_tying=True"),
    ],
    ids=["no-lora", "dora", "merged", "scaled", "two-adapters", "hook", "tied"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT on tied adapters without tied layers
def test_models_that_cannot_be_gated(tmp_path, make_model, error, message):
    refuse(tmp_path, error, message, WeightLora(1, 2, dense_steps=1), model=make_model())


def test_a_callback_twice_or_for_a_second_training_or_too_late(tmp_path):
    once = WeightLora(5, 2, dense_steps=1)
    refuse(tmp_path, SettingsError, r"begun a training of this model already.*Add it once", once, once)
    two = [WeightLora(5, 2, dense_steps=1) for _ in range(2)]
    refuse(tmp_path, AdapterError, r"has a gate already: WeightLora was added twice", *two)

    class Late(TrainerCallback):
        def on_epoch_begin(self, *_, **__):
            trainer.add_callback(WeightLora(5, 2, dense_steps=1))

    trainer = make_trainer(tmp_path, tiny_llama(), Late())
    with pytest.raises(SettingsError, match=r"added after the training had begun"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "selection.json").write_text("precious")
    refuse(
        tmp_path, OutputError, r"selection\.json' is the outcome of another training", WeightLora(5, 2, dense_steps=1)
    )
    assert (tmp_path / "selection.json").read_text() == "precious"


def test_an_optimizer_that_does_not_hold_the_sites(tmp_path):
    model = tiny_llama()
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path, 4),
        train_dataset=rows(),
        data_collator=Collator(),
        optimizers=(optimizer, schedule),
        callbacks=[WeightLora(5, 2, dense_steps=1)],
    )
    with pytest.raises(SettingsError, match=r"optimizer does not hold the parameters of model\.layers\.0"):
        trainer.train()


def test_frozen_sites():
    model = tiny_llama()
    sites = preconditions_sites(model)
    model.requires_grad_(False)
    with pytest.raises(AdapterError, match=r"down_proj is frozen\. Load the adapter with is_trainable=True"):
        preconditions.check_optimizer(sites, torch.optim.SGD([nn.Parameter(torch.zeros(1))]))


def preconditions_sites(model):
    from lorazor.adapter.sites import find_sites

    return find_sites(model)


PLAIN = {
    "fp16": False,
    "n_gpu": 0,
    "world_size": 1,
    "torch_compile": False,
    "auto_find_batch_size": False,
    "ddp_find_unused_parameters": None,
    "ddp_static_graph": None,
    "activation_checkpointing": False,
}


@pytest.mark.parametrize(
    ("changes", "state", "grow", "message"),
    [
        ({"fp16": True}, {}, False, r"fp16=True scales the loss"),
        ({}, {"mixed_precision": "fp16"}, False, r"fp16=True scales the loss"),
        ({}, {"distributed_type": "FSDP"}, False, r"Under FSDP, .* 'lorazor train --selection"),
        ({}, {"distributed_type": "DEEPSPEED"}, False, r"Under DEEPSPEED"),
        ({"n_gpu": 2}, {}, False, r"2 GPUs with DataParallel"),
        ({"torch_compile": True}, {}, False, r"torch_compile=True"),
        ({"auto_find_batch_size": True}, {}, False, r"auto_find_batch_size=True"),
        ({"world_size": 2}, {}, True, r"grow='paper' makes new parameters, which DDP"),
        ({"world_size": 2, "ddp_find_unused_parameters": False}, {}, False, r"ddp_find_unused_parameters=True"),
        ({"world_size": 2, "ddp_static_graph": True}, {}, False, r"ddp_static_graph off"),
        ({"world_size": 2, "activation_checkpointing": True}, {}, False, None),  # PeftModel: the Trainer looks
        ({"world_size": 2}, {}, False, None),
        ({}, {}, True, None),
    ],
)
def test_ways_of_training(monkeypatch, changes, state, grow, message):
    state = SimpleNamespace(**{"distributed_type": "NO", "mixed_precision": "no", **state})
    monkeypatch.setattr(preconditions, "AcceleratorState", lambda: state)
    settings = WeightLoraSettings(5, 20, grow="paper" if grow else None)
    args = SimpleNamespace(**{**PLAIN, **changes})

    def check():
        check_arguments(args, tiny_llama())
        check_in_place(args, tiny_llama(), settings)

    if message is None:
        check()
        return
    with pytest.raises(SettingsError, match=message):
        check()


def test_ddp_with_an_adapter_that_transformers_loaded(monkeypatch):
    """There the Trainer does not look for unused parameters when activations are computed again."""
    state = SimpleNamespace(distributed_type="MULTI_CPU", mixed_precision="no")
    monkeypatch.setattr(preconditions, "AcceleratorState", lambda: state)
    args = SimpleNamespace(**{**PLAIN, "world_size": 2, "activation_checkpointing": True})
    with pytest.raises(SettingsError, match=r"ddp_find_unused_parameters=True"):
        check_in_place(args, tiny_model("llama", 1), WeightLoraSettings(5, 20))


@pytest.mark.parametrize("select_steps", [0, -1, 2.5])
def test_a_forgotten_warmup_is_named(tmp_path, select_steps):
    with pytest.raises(SettingsError, match=f"select_steps={select_steps}"):
        make_trainer(tmp_path, tiny_llama(), WeightLora(4, select_steps)).train()
