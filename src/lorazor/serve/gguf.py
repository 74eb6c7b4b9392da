"""LoRA as a GGUF file, which llama.cpp reads, and Ollama with it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorazor.adapter.folder import AdapterFolder, load_tensors
from lorazor.errors import SettingsError, UnsupportedAdapterError
from lorazor.serve.base import BaseOutline

GGUF_FILE = "adapter.gguf"

_ARCHITECTURES = {
    "LlamaForCausalLM": "LLAMA",
    "MistralForCausalLM": "LLAMA",
    "Qwen2ForCausalLM": "QWEN2",
    "Qwen3ForCausalLM": "QWEN3",
    "Phi3ForCausalLM": "PHI3",
    "GemmaForCausalLM": "GEMMA",
    "Gemma2ForCausalLM": "GEMMA2",
    "Gemma3ForCausalLM": "GEMMA3",
}
"""llama.cpp's name of an architecture. Others change more of their matrices on the way than the order of heads."""


def check_can_be_gguf(folder: AdapterFolder, base: BaseOutline) -> None:
    """Refuse what cannot be written as GGUF, before long work.

    Raises:
        SettingsError: the gguf package is not installed.
        UnsupportedAdapterError: the architecture is none of those known, or a site is on something else than a linear
            map of a layer or the output layer.
    """
    if find_spec("gguf") is None:
        raise SettingsError("A GGUF file needs the gguf package. Run: pip install 'lorazor[gguf]'")
    if base.architecture not in _ARCHITECTURES:
        raise UnsupportedAdapterError(
            f"{base.architecture} cannot be written as GGUF here, but {', '.join(_ARCHITECTURES)}. llama.cpp has "
            "convert_lora_to_gguf.py for others: run it on what 'lorazor export --for peft' writes."
        )
    for site in folder.sites:
        if not site.has_directions or _tensor_name(site.name, base) is None:
            raise UnsupportedAdapterError(f"LoRA on {site.name!r} cannot be written as GGUF. Leave it out.")


def write_gguf(folder: AdapterFolder, base: BaseOutline, path: Path) -> None:
    """Write an adapter as GGUF: A and B of every site by llama.cpp's names, and one alpha.

    llama.cpp scales a site by alpha over the rank of its own B, so ranks may differ.

    Args:
        folder: an adapter with plain alpha / r.
        base: its base model.
        path: the file.
    Raises:
        UnsupportedAdapterError, SettingsError: see `check_can_be_gguf`.
    Source: ggml-org/llama.cpp, convert_lora_to_gguf.py and src/llama-adapter.cpp.
    """
    check_can_be_gguf(folder, base)
    import gguf

    arch = gguf.MODEL_ARCH[_ARCHITECTURES[base.architecture]]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(folder.config["lora_alpha"]))
    tensors = load_tensors(folder)
    for name, keys in folder.keys.items():
        A, B = tensors[keys["lora_A.weight"]], tensors[keys["lora_B.weight"]]
        target = _tensor_name(name, base)
        _add(writer, f"{target}.lora_a", A)
        _add(writer, f"{target}.lora_b", _in_order_of_heads(name, B, base))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensor_name(name: str, base: BaseOutline) -> str | None:
    """`blk.3.attn_q.weight` of `model.layers.3.self_attn.q_proj`."""
    import gguf

    arch = gguf.MODEL_ARCH[_ARCHITECTURES[base.architecture]]
    found = gguf.get_tensor_name_map(arch, max(base.n_layers.values())).get_name(name)
    return None if found is None else f"{found}.weight"


def _in_order_of_heads(name: str, B: Tensor, base: BaseOutline) -> Tensor:
    """B with its rows as llama.cpp has those of q and k in models of Llama's kind.

    transformers rotates the first half of a head against the second, llama.cpp even rows against odd ones, in the order
    of the original weights.

    Args:
        name: of the site.
        B: (d_out, r).
        base: its heads.
    Source: llama.cpp, conversion of LlamaModel, permute.
    """
    last = name.rpartition(".")[2]
    if _ARCHITECTURES[base.architecture] != "LLAMA" or last not in ("q_proj", "k_proj"):
        return B
    n_heads = base.n_heads[0 if last == "q_proj" else 1]
    return B.reshape(n_heads, 2, len(B) // n_heads // 2, -1).swapaxes(1, 2).reshape(B.shape)


def _add(writer: Any, name: str, tensor: Tensor) -> None:
    """Add a tensor in its own number format."""
    import gguf

    if tensor.dtype == torch.bfloat16:  # NumPy has no such numbers
        kind = gguf.GGMLQuantizationType.BF16
        writer.add_tensor(name, gguf.quants.quantize(tensor.float().numpy(), kind), raw_dtype=kind)
    else:
        narrow = tensor if tensor.dtype == torch.float16 else tensor.float()
        writer.add_tensor(name, narrow.contiguous().numpy())
