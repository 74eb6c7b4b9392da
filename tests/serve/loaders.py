"""What servers' own code makes of an adapter folder: transcribed, each with the place it is from.

Every function returns what the server adds to the parameters of the base model, by name, or raises what the server
raises. Placement on devices, sharding and padding of buffers are left out; names, ranks, scalings and what is skipped
are as in the source.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.serve.forms import N_LAYERS

Deltas = dict[str, Tensor]
PREFIX = "base_model.model."


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((path / "adapter_config.json").read_text()), load_file(path / "adapter_model.safetensors")


def layer_of(name: str) -> int | None:
    """sglang, srt/layers/utils.py get_layer_id."""
    match = re.search(r"layers\.(\d+)\.", name)
    return None if match is None else int(match[1])


# sglang 0.5.23

_NORMALIZED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
_NORMALIZED |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}
_STACKED = {"qkv_proj": 3, "gate_up_proj": 2}


def sglang(path: Path, base: nn.Module) -> Deltas:
    config, tensors = read(path)
    targets = sglang_targets(config["target_modules"])
    if config.get("use_dora"):  # srt/lora/lora_manager.py:349
        raise ValueError("LoRA serving currently doesn't support DoRA adapters")
    r, scaling = config["r"], config["lora_alpha"] / config["r"]  # srt/lora/lora.py:71, lora_config.py:43
    layers: list[dict[str, Tensor]] = [{} for _ in range(N_LAYERS)]
    embeddings: dict[str, Tensor] = {}
    for name, weight in tensors.items():  # srt/lora/lora.py _process_weight
        layer = layer_of(name)
        if layer is not None:
            layers[layer][name] = weight
        elif "embed_tokens" in name or "lm_head" in name:
            if ("embed_tokens" if "embed_tokens" in name else "lm_head") in targets:
                embeddings[name] = weight
    found: Deltas = {}
    for weights in layers:
        sglang_qkv(list(weights), weights)
        sglang_gate_up(list(weights), weights)
        buffers = {sglang_target(name, targets) + ("_A" if "lora_A" in name else "_B"): name for name in weights}
        for key, name in buffers.items():  # srt/lora/mem_pool.py:1240, 1390: buffers of rank config.r
            c = _STACKED.get(key[:-2], 1)
            rank = weights[name].shape[0] if key.endswith("_A") else weights[name].shape[1] * c
            assert rank == r * c, f"LoRA buffer of {r * c} does not match weight {tuple(weights[name].shape)}."
        for key, name in buffers.items():
            if key.endswith("_A"):
                found |= sglang_deltas(name, weights[name], weights[name.replace("lora_A", "lora_B")], r, base)
    for name, A in embeddings.items():
        for a, b in (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")):
            if name.endswith(a):
                B = embeddings[name.replace(a, b)]
                module = name.removeprefix(PREFIX).removesuffix(f".{a}")
                found[f"{module}.weight"] = (B @ A).T if a == "lora_embedding_A" else B @ A
    return {name: scaling * delta for name, delta in found.items()}


def sglang_deltas(name: str, A: Tensor, B: Tensor, r: int, base: nn.Module) -> Deltas:
    """The slices of a stacked buffer, srt/lora/layers.py: QKVParallelLinearWithLoRA and MergedColumnParallelLinear."""
    module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
    parent, _, last = module.rpartition(".")
    parts = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}.get(last, (last,))
    sizes = [base.get_submodule(f"{parent}.{part}").weight.shape[0] for part in parts]
    slices = zip(parts, A.split(r), B.split(sizes), strict=True)
    return {f"{parent}.{part}.weight": b @ a for part, a, b in slices}


def sglang_targets(targets: list[str] | str) -> set[str]:
    """srt/lora/utils.py:277 get_normalized_target_modules."""
    if isinstance(targets, str):
        raise ValueError("Only 'all' or 'all-linear' can be used as the string for target module")
    return {_NORMALIZED.get(name.split(".")[-1], name.split(".")[-1]) for name in targets}


def sglang_target(name: str, targets: set[str]) -> str:
    """srt/lora/utils.py:351 get_target_module_name."""
    best = max((one for one in targets if one in name), key=len, default=None)
    if best is None:
        raise ValueError(f"Cannot find target module name for {name} in {targets}")
    return best


def sglang_qkv(names: list[str], weights: dict[str, Tensor]) -> None:
    """srt/lora/lora.py:265 normalize_qkv_proj."""
    there = {last for name in names for last in ("k_proj", "q_proj", "v_proj") if last in name}
    for name in names:
        if "q_proj" in name:
            k, v = name.replace("q_proj", "k_proj"), name.replace("q_proj", "v_proj")
            k_weight = weights[k] if "k_proj" in there else torch.zeros_like(weights[v])
            weights[name.replace("q_proj", "qkv_proj")] = torch.cat((weights[name], k_weight, weights[v]), 0)
            weights.pop(name)
            if "k_proj" in there:
                weights.pop(k)
            weights.pop(v)


def sglang_gate_up(names: list[str], weights: dict[str, Tensor]) -> None:
    """srt/lora/lora.py:462 normalize_gate_up_proj."""
    for name in names:
        if "gate_proj" in name:
            up = name.replace("gate_proj", "up_proj")
            if up not in weights or weights[up].numel() == 0:
                weights[up] = torch.zeros_like(weights[name])
            cat_dim = weights[name].dim() - 2
            weights[name.replace("gate_proj", "gate_up_proj")] = torch.cat((weights[name], weights[up]), cat_dim)
            weights.pop(name)
            weights.pop(up)


# text-generation-inference 45d95bd, adapters/lora.py; LoRAX 03679f3 is its origin

_TGI_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj")


def tgi(path: Path, base: nn.Module, layer_types: tuple[str, ...] = _TGI_LAYERS) -> Deltas:
    config, tensors = read(path)
    r = config["r"]
    found: Deltas = {}
    for kind in layer_types:  # models/__init__.py: prepare_weights for each, with one config
        names = [name for name, module in base.named_modules() if name.rpartition(".")[2] == kind]
        pairs = [
            (tensors[f"{PREFIX}{name}.lora_A.weight"], tensors[f"{PREFIX}{name}.lora_B.weight"])
            for name in names
            if f"{PREFIX}{name}.lora_A.weight" in tensors
        ]
        if not names or len(pairs) < len(names):
            continue  # prepare_weights: "There is no LoRA weight for this layer type in the adapter": return None
        scale = config["lora_alpha"] / (r**0.5 if config.get("use_rslora") else r)
        scaled = [(pad_rank(A.T, 1), pad_rank(B.T * scale, 0)) for A, B in pairs]
        r = scaled[0][0].size(1)  # config.r = padded_rank
        stacked_a, stacked_b = (torch.stack(list(some)) for some in zip(*scaled, strict=True))
        for name, A, B in zip(names, stacked_a, stacked_b, strict=True):
            found[f"{name}.weight"] = (A @ B).T
    return found


def lorax(path: Path, base: nn.Module) -> Deltas:
    """Also of the output layer, and, since is_embed, of the embedding."""
    config, tensors = read(path)
    found = tgi(path, base, (*_TGI_LAYERS, "lm_head"))
    a, b = (tensors.get(f"{PREFIX}model.embed_tokens.lora_embedding_{part}") for part in "AB")
    if a is not None and b is not None:
        found["model.embed_tokens.weight"] = (b @ a).T * config["lora_alpha"] / config["r"]
    return found


def pad_rank(tensor: Tensor, dim: int) -> Tensor:
    """punica-sgmv pad_rank, of one process."""
    rank = tensor.size(dim)
    target = 8 if rank <= 8 else (rank + 15) // 16 * 16
    pad = [0, 0] * tensor.dim()
    pad[(tensor.dim() - dim - 1) * 2 + 1] = target - rank
    return nn.functional.pad(tensor, tuple(pad))


# vLLM


def vllm(path: Path, base: nn.Module) -> Deltas:
    """0.32.0: lora/peft_helper.py, lora/lora_model.py."""
    config, tensors = read(path)
    saved = [name for name in config.get("modules_to_save") or [] if name not in ("classifier", "score")]
    if saved or config.get("use_dora") or config.get("lora_bias"):  # _validate_features
        raise ValueError("vLLM does not support this.")

    def match(pattern: dict[str, Any], name: str) -> Any:
        return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), None)

    def scaling(name: str) -> float:  # get_rank_and_scaling
        rank = match(config.get("rank_pattern") or {}, name) or config["r"]
        alpha = match(config.get("alpha_pattern") or {}, name)
        alpha = config["lora_alpha"] if alpha is None else alpha
        return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)

    return _by_name(tensors, scaling)


def vllm_old(path: Path, base: nn.Module) -> Deltas:
    """Up to 0.31: PEFTHelper has no patterns."""
    config, tensors = read(path)
    if config.get("modules_to_save") or config.get("use_dora"):
        raise ValueError("vLLM only supports modules_to_save being None.")
    scaling = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    return _by_name(tensors, lambda name: scaling)


def _by_name(tensors: dict[str, Tensor], scaling: Any) -> Deltas:
    """lora/utils.py parse_fine_tuned_lora_name, lora/lora_model.py from_lora_tensors."""
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.endswith((".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")):
            continue
        parts = key.removeprefix(PREFIX).split(".")
        if parts[-1] == "weight" and parts[-2] in ("lora_A", "lora_B"):
            pairs.setdefault(".".join(parts[:-2]), {})[parts[-2][-1]] = tensor
        elif parts[-1] in ("lora_embedding_A", "lora_embedding_B"):
            pairs.setdefault(".".join(parts[:-1]), {})[f"embedding {parts[-1][-1]}"] = tensor
        else:
            raise ValueError(f"{key} is unsupported LoRA weight")
    return {f"{name}.weight": scaling(name) * _product(pair) for name, pair in pairs.items()}


def _product(pair: dict[str, Tensor]) -> Tensor:
    return pair["B"] @ pair["A"] if "A" in pair else (pair["embedding B"] @ pair["embedding A"]).T


# TensorRT-LLM 007e181, lora_manager.py

_HF_LORA = re.compile(
    r"(.*)\.(\d+)\.(\w+)\.(\w+|\w+\.\w+|(\w+)\.(\d+)\.(\w+))\.(?:lora_(?:(A|B)\.weight|(magnitude)_vector))"
)


def tensorrt_llm(path: Path, base: nn.Module) -> Deltas:
    config, tensors = read(path)
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():  # iterate_hf_lora
        if _HF_LORA.match(key):
            name, part = key.removeprefix(PREFIX).removesuffix(".weight").rsplit(".lora_", 1)
            assert name.rpartition(".")[2] in _TGI_LAYERS, f"{name} is not in supported list"
            pairs.setdefault(name, {})[part] = tensor
        elif "lm_head" not in key and "embed_tokens" not in key:
            raise KeyError(f"unsupported key {key} from HF LoRA weights")
    found = {}
    for name, pair in pairs.items():  # load_from_model_dir
        rank = pair["A"].shape[0]
        scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
        found[f"{name}.weight"] = (pair["B"] * scale) @ pair["A"]
        if "magnitude_vector" in pair:  # norm_dora_magnitude, which nothing calls here, divides before
            weight = base.get_parameter(f"{name}.weight").detach()
            full = weight + found[f"{name}.weight"]
            found[f"{name}.weight"] = pair["magnitude_vector"][:, None] * full - weight
    return found


# llama.cpp


def llama_cpp(path: Path, base: nn.Module) -> Deltas:
    """A folder through convert_lora_to_gguf.py at 0b03ada, or a GGUF file; then src/llama-adapter.h get_scale."""
    if (path / "adapter.gguf").exists():
        return read_gguf(path / "adapter.gguf", base)
    config, tensors = read(path)
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():  # get_tensors
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_(embedding_)?([AB])(\.weight)?", key)
        if match is None:
            if ".base_layer.weight" in key:
                continue
            if "_layernorm" in key or ".norm" in key:
                continue  # written, and left out by src/llama-adapter.cpp: "TODO: add support for norm vector"
            raise SystemExit(1)
        pairs.setdefault(match[1], {})[f"embedding {match[3]}" if match[2] else match[3]] = tensor
    alpha = config["lora_alpha"]
    ranks = {name: (pair.get("B", pair.get("embedding B"))).shape[1] for name, pair in pairs.items()}
    return {f"{name}.weight": alpha / ranks[name] * _product(pair) for name, pair in pairs.items()}


_NAMES = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
_NAMES |= {"attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj"}
_NAMES |= {"ffn_down": "mlp.down_proj"}


def read_gguf(path: Path, base: nn.Module) -> Deltas:
    """src/llama-adapter.cpp: pairs by name, scale alpha / rank of B; rows of q and k put back in their order."""
    import gguf

    reader = gguf.GGUFReader(path)
    text = {key: reader.fields[key].contents() for key in ("general.type", "adapter.type", "general.architecture")}
    assert text == {"general.type": "adapter", "adapter.type": "lora", "general.architecture": "llama"}
    alpha = reader.fields["adapter.lora.alpha"].contents()
    tensors = {one.name: torch.from_numpy(one.data.copy()) for one in reader.tensors}
    found = {}
    for name, A in tensors.items():
        if name.endswith(".lora_a"):
            B = tensors[name.replace(".lora_a", ".lora_b")]
            match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight\.lora_a", name)
            module = "lm_head" if match is None else f"model.layers.{match[1]}.{_NAMES[match[2]]}"
            assert match is not None or name == "output.weight.lora_a"
            delta = alpha / B.shape[1] * B @ A
            if module.endswith(("q_proj", "k_proj")):
                config: Any = base.config
                heads = config.num_attention_heads if module.endswith("q_proj") else config.num_key_value_heads
                delta = delta.reshape(heads, -1, 2, delta.shape[1]).transpose(1, 2).reshape(delta.shape)
            found[f"{module}.weight"] = delta
    return found


LOADERS = {
    "vllm": vllm,
    "vllm-old": vllm_old,
    "sglang": sglang,
    "tgi": tgi,
    "lorax": lorax,
    "tensorrt-llm": tensorrt_llm,
    "llama.cpp": llama_cpp,
}
