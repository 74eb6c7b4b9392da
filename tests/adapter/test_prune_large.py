"""Pruning an adapter of the size people have."""

import time

import pytest
import torch
from torch import nn

from lorazor.adapter.folder import read_adapter
from lorazor.adapter.prune import select_boundary, write_pruned
from tests.tiny_models import write_adapter_folder

HIDDEN, INNER = 4096, 11008
PROJECTIONS = {
    **{f"self_attn.{kind}_proj": (8, HIDDEN, HIDDEN) for kind in "qkvo"},
    "mlp.gate_proj": (8, HIDDEN, INNER),
    "mlp.up_proj": (8, HIDDEN, INNER),
    "mlp.down_proj": (8, INNER, HIDDEN),
}


@pytest.mark.slow
def test_an_adapter_of_a_7b_model_is_pruned_in_ten_seconds_without_a_base_model(tmp_path, monkeypatch):
    shapes = {f"model.layers.{i}.{kind}": shape for i in range(32) for kind, shape in PROJECTIONS.items()}
    patterns = {"alpha_pattern": {"q_proj": 3}}  # some tensors are folded too
    full = write_adapter_folder(tmp_path / "full", shapes, torch.float16, base_model_name_or_path="nowhere", **patterns)

    def refuse(*arguments, **settings):
        raise AssertionError("a module was built")

    monkeypatch.setattr(nn.Module, "__init__", refuse)
    start = time.perf_counter()
    result = write_pruned(full, select_boundary(read_adapter(full).sites, 20), tmp_path / "pruned")
    seconds = time.perf_counter() - start
    assert (result.n_sites_kept, result.n_sites) == (140, 224)
    assert (result.n_parameters_kept, result.n_parameters) == (20 * 624_640, 32 * 624_640)
    assert result.n_bytes / result.n_bytes_before == pytest.approx(20 / 32, rel=0.02)
    assert seconds < 10
