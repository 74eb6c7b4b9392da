"""Trainings that are broken off, and how they have to end when they go on."""

from __future__ import annotations

import torch
from safetensors.torch import load_file


def weights_of(folder):
    return load_file(folder / "adapter_model.safetensors")


class Killed(BaseException):
    """Nothing in the code catches it, as nothing catches kill -9."""


def check_ends_like(whole, result, n_steps):
    """The choice, the steps and the weights of a run without a break."""
    assert (result.out / "selection.json").read_text() == (whole / "selection.json").read_text()
    assert [entry["step"] for entry in result.log] == list(range(1, n_steps + 1))
    expected, seen = weights_of(whole), weights_of(result.out)
    assert seen.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(seen[name], tensor, atol=1e-6, rtol=0)


def kill_in(monkeypatch, target, name, when=lambda *args, **kwargs: True):
    """The next call that fits ends the process, so to speak."""
    original = getattr(target, name)
    state = {"alive": True}

    def call(*args, **kwargs):
        if state["alive"] and when(*args, **kwargs):
            state["alive"] = False
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(target, name, call)


def at_step(folder, step):
    def when(self, args, state, *rest, **kwargs):
        return args.output_dir.endswith(folder) and state.global_step == step

    return when
