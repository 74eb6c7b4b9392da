"""A training that goes on from a checkpoint ends where one without a break ends; other checkpoints are refused."""

from __future__ import annotations

import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from lorazor.adapter.sites import find_sites
from lorazor.errors import SettingsError
from lorazor.train.callback import WeightLora
from tests.tiny_models import tiny_model
from tests.train.tiny_training import N_LAYERS, make_trainer, tiny_llama

STEPS, WARMUP = 6, 4


def callback_of(**changes):
    settings = {"keep": 4, "select_steps": WARMUP, "schedule": "every-step", "gate_lr": 30.0, "dense_steps": 1}
    return WeightLora(**{**settings, **changes})


def trainer_of(folder, callback, model=None, **kwargs):
    settings = {"steps": STEPS, "save_strategy": "steps", "save_steps": 1, **kwargs}
    return make_trainer(folder, model or tiny_llama(), callback, **settings)


def after_the_cut(checkpoint):
    """The survivors, as a user loads them to train on."""
    return PeftModel.from_pretrained(tiny_model("llama", N_LAYERS), checkpoint, is_trainable=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A training without a break, with growth, and all its checkpoints."""
    folder, callback = tmp_path_factory.mktemp("whole"), callback_of(grow="paper")
    trainer_of(folder, callback).train()
    return folder, callback.selection


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 3, WARMUP, 5])
def test_a_resumed_training_ends_like_one_without_a_break(whole, tmp_path, step):
    folder, selection = whole
    shutil.copytree(folder / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    callback = callback_of(grow="paper")
    model = tiny_llama() if step < WARMUP else after_the_cut(tmp_path / f"checkpoint-{step}")
    trainer_of(tmp_path, callback, model).train(resume_from_checkpoint=True)
    assert callback.selection.to_json() == selection.to_json()
    if step < WARMUP:
        assert (tmp_path / "gates.jsonl").read_text() == (folder / "gates.jsonl").read_text()
    end = f"checkpoint-{STEPS}/adapter_model.safetensors"
    expected, seen = load_file(folder / end), load_file(tmp_path / end)
    assert seen.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(seen[name], tensor, atol=1e-6, rtol=0)


def test_a_checkpoint_elsewhere_is_found(whole, tmp_path):
    checkpoint = str(whole[0] / "checkpoint-3")
    callback = callback_of(grow="paper")
    trainer_of(tmp_path, callback, save_strategy="no").train(resume_from_checkpoint=checkpoint)
    assert callback.selection.to_json() == whole[1].to_json()


def test_a_checkpoint_elsewhere_goes_before_one_of_another_training_in_the_folder(tmp_path):
    """By direction, where nothing in the evidence shows whose it is."""
    settings = {"keep": 5, "schedule": "one-cut", "by": "direction", "score": "fisher"}
    callbacks = {name: callback_of(**settings) for name in ("one", "other")}
    for name, callback in callbacks.items():
        trainer_of(tmp_path / name, callback, learning_rate=5e-3 if name == "one" else 1e-1).train()
    again = callback_of(**settings)
    trainer_of(tmp_path / "other", again, save_strategy="no").train(
        resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-3")
    )
    scores = [[site.score for site in one.selection.sites] for one in (callbacks["one"], again, callbacks["other"])]
    torch.testing.assert_close(torch.tensor(scores[1]), torch.tensor(scores[0]), rtol=1e-5, atol=0)
    assert not torch.allclose(torch.tensor(scores[2]), torch.tensor(scores[0]), rtol=1e-2, atol=0)


def test_checkpoints_that_do_not_fit_are_refused(whole, tmp_path):
    for step in (2, 5):
        shutil.copytree(whole[0] / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")

    def resume(step, message, model=None, **changes):
        model = model or tiny_llama()
        trainer = trainer_of(tmp_path, callback_of(**{"grow": "paper", **changes}), model)
        with pytest.raises(SettingsError, match=message):
            trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert {type(site.module.scaling["default"]) for site in find_sites(model)} == {float}

    resume(2, r"gate_lr=5\.0, but the run to resume had gate_lr=30\.0", gate_lr=5.0)
    resume(
        5, r"were chosen with .*'keep': 4.* Pass the same settings", after_the_cut(tmp_path / "checkpoint-5"), keep=3
    )
    # the survivors' weights load into all sites, and only the optimizer's state would tell
    (tmp_path / "checkpoint-5" / "optimizer.pt").unlink()
    shutil.copyfile(
        whole[0] / "checkpoint-3" / "adapter_model.safetensors", tmp_path / "checkpoint-5/adapter_model.safetensors"
    )
    resume(5, r"The model has 14 LoRA sites, but the checkpoint 4\. .*PeftModel\.from_pretrained", tiny_llama())
    (tmp_path / "checkpoint-5" / "selection.json").unlink()
    resume(5, r"no checkpoint of a finished warm-up", tiny_llama())

    warmup = tmp_path / "checkpoint-2" / "lorazor_warmup.pt"
    shutil.copyfile(whole[0] / "checkpoint-3" / "lorazor_warmup.pt", warmup)
    resume(2, r"is of step 3, but the checkpoint of step 2")
    state = torch.load(whole[0] / "checkpoint-2" / "lorazor_warmup.pt", weights_only=True)
    state["B"]["model.layers.1.mlp.up_proj"][0][0, 0] += 1
    torch.save(state, warmup)
    resume(2, r"does not belong to the weights of model\.layers\.1\.mlp\.up_proj")
    state["B"] = dict(list(state["B"].items())[1:])
    torch.save(state, warmup)
    resume(2, r"is of other LoRA sites")
    warmup.write_bytes(warmup.read_bytes()[:100])
    resume(2, r"Cannot read .*lorazor_warmup\.pt")
    warmup.unlink()
    resume(2, r"Cannot go on with the warm-up: .*lorazor_warmup\.pt' is missing")


@pytest.mark.parametrize("step", [pytest.param(2, marks=pytest.mark.slow), 5])
def test_what_is_trained_whole_beside_lora_goes_on_too(tmp_path, step):
    """`modules_to_save`: embeddings and output layer, within the warm-up and after the cut."""

    def model_of():
        torch.manual_seed(0)
        return tiny_llama(modules_to_save=["embed_tokens", "lm_head"])

    trainer_of(tmp_path / "whole", callback_of(grow="paper"), model_of()).train()
    shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", tmp_path / "again" / f"checkpoint-{step}")
    model = model_of() if step < WARMUP else after_the_cut(tmp_path / "again" / f"checkpoint-{step}")
    trainer_of(tmp_path / "again", callback_of(grow="paper"), model).train(resume_from_checkpoint=True)
    end = f"checkpoint-{STEPS}/adapter_model.safetensors"
    expected, seen = load_file(tmp_path / "whole" / end), load_file(tmp_path / "again" / end)
    assert seen.keys() == expected.keys() and sum("lora_" not in name for name in seen) == 2
    start = model_of().state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(seen[name], tensor, atol=1e-6, rtol=0)
        if "lora_" not in name:
            assert (tensor - start[name.replace(".weight", ".modules_to_save.default.weight")]).abs().max() > 1e-4
