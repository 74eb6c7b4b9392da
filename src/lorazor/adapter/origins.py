"""Where adapter folders come from: names that a training left in them, other tools, other versions."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open

from lorazor.errors import AdapterError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"

_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""What torch.compile, FSDP and recomputation put into the names of the modules that they wrap."""
_FOREIGN = {
    "adapters.safetensors": "an adapter of MLX. Convert it to PEFT's names",
    "adapters.npz": "an adapter of MLX. Convert it to PEFT's names",
    "pytorch_lora_weights.safetensors": "LoRA of diffusers, for a model of images; lorazor measures models of text",
}
_FUSED = re.compile("qkv|gate_up|c_attn|query_key_value|W_pack|Wqkv")
"""Projections of which some trainers make one, of several that they trained."""


def unwrapped(key: str) -> str:
    """A tensor's key without the names of what a model was wrapped in while it was trained."""
    return ".".join(part for part in key.removeprefix("module.").split(".") if part not in _WRAPPERS)


def check_is_of_peft(path: Path) -> None:
    """Say what a folder is that is no adapter of PEFT."""
    foreign = next((what for name, what in _FOREIGN.items() if (path / name).is_file()), None)
    if foreign is not None and not any((path / name).is_file() for name in (WEIGHTS_FILE, PICKLE_FILE)):
        raise AdapterError(f"{str(path)!r} is {foreign}, or pass the adapter as PEFT saves it.")
    if (path / CONFIG_FILE).is_file():
        return
    if inside := sorted((found.parent.name for found in path.glob(f"*/{CONFIG_FILE}")), key=_by_numbers):
        more = f", and {len(inside) - 5} more" if len(inside) > 5 else ""
        raise AdapterError(
            f"{str(path)!r} is no adapter itself, but has {', '.join(map(repr, inside[:5]))}{more} inside. Pass one of "
            f"them: {str(path / inside[-1])!r}."
        )
    for file in sorted(path.glob("*.safetensors")):
        with suppress(SafetensorError, OSError), safe_open(file, framework="pt") as tensors:
            if any(".lora_down." in key or key.startswith(("lora_unet_", "lora_te")) for key in tensors.keys()):
                raise AdapterError(
                    f"{str(file)!r} is LoRA as kohya's trainers and image tools write it. lorazor measures models of "
                    "text; pass the adapter as PEFT saves it."
                )


def _by_numbers(name: str) -> list[tuple[int, str]]:
    """The order in which `checkpoint-1000` comes after `checkpoint-900`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"([0-9]+)", name)]


def about_ranks(name: str, rank: int, expected: float, alpha: float) -> str:
    """What to do where a tensor has another rank than the config, which PEFT does not load."""
    last, times = name.rpartition(".")[2], rank / expected
    if not (_FUSED.search(last) and times.is_integer()):
        return "They must agree."
    return (
        f"As LoRA of {times:g} projections that were joined in one: its config needs rank_pattern {{{last!r}: {rank}}} "
        f"and, for the scaling that each of them had, alpha_pattern {{{last!r}: {times * alpha:g}}}; the file does not "
        "say that it is so."
    )
