"""The form in which a base model's weights are kept: full, or quantised to a few bits.

An adapter was trained on one form. On another one the base model computes something else, often by far more than an
adapter loses by becoming smaller, so that it is said when the two differ.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from lorazor.adapter.card import CARD_FILE
from lorazor.adapter.folder import AdapterFolder
from lorazor.errors import BaseModelError

FULL = "full"
_CHOSEN = ("nf4", "fp4", "int8")
"""Forms that `--quantization` gives a full base."""
_FOUR_BITS = "4-bit"
"""Said of a base model whose name is all that is known; nf4 and fp4 are such forms."""
_NOTE = "The following `bitsandbytes` quantization config was used during training:"
_NAMES = {r"bnb-4bit$": _FOUR_BITS, r"bnb-8bit$": "int8"}


def form_of(config: PreTrainedConfig | Mapping[str, Any]) -> str:
    """The form of a base model by its config: `full`, `nf4`, `fp4`, `int8`, or a method such as `gptq`."""
    name = "quantization_config"
    found = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
    if not found:
        return FULL
    settings: Mapping[str, Any] = found if isinstance(found, Mapping) else found.to_dict()
    if settings.get("load_in_8bit"):
        return "int8"
    if settings.get("load_in_4bit"):
        return str(settings.get("bnb_4bit_quant_type") or "fp4")  # the default of bitsandbytes
    method = settings.get("quant_method") or "unknown"
    return str(getattr(method, "value", method))


def quantizing(
    config: PreTrainedConfig, form: str | None, source: str, dtype: str | torch.dtype, whole: list[str]
) -> dict[str, Any]:
    """What `from_pretrained` is to be told, so that a base model has a form.

    Args:
        config: of the base model, which may be stored in a form already.
        form: the one to have, None for that in which it is stored.
        source: names the base model in messages.
        dtype: in which its layers compute, `auto` for that of the checkpoint.
        whole: modules that stay as they are, such as a head to be trained; none for those that stay by default.
    Raises:
        BaseModelError: it is stored in another form, or in one that transformers does not know.
    """
    stored = form_of(config)
    if stored not in (FULL, *_CHOSEN) and stored not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        raise BaseModelError(
            f"The base model {source!r} is quantised by {stored!r}, which this transformers cannot load. Pass another "
            f"form of it (--model)."
        )
    if form in (None, stored):
        return {}
    if stored != FULL:
        raise BaseModelError(
            f"The base model {source!r} is stored in {stored}, so it cannot be loaded in {form}. Leave --quantization "
            f"out, or pass the full model that it was made of (--model)."
        )
    compute = (getattr(config, "dtype", None) or torch.float32) if dtype == "auto" else dtype
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_8bit=form == "int8",
            load_in_4bit=form != "int8",
            bnb_4bit_quant_type=form if form != "int8" else "nf4",
            bnb_4bit_use_double_quant=True,  # as QLoRA has it, arXiv:2305.14314
            bnb_4bit_compute_dtype=compute,
            llm_int8_skip_modules=whole or None,
        )
    }


def other_form(folder: AdapterFolder, config: PreTrainedConfig) -> str | None:
    """A warning where an adapter is on another form of its base model than the one it was trained on, else None."""
    trained, here = _form_trained_on(folder), form_of(config)
    if trained is None and here not in _CHOSEN and folder.config.get("base_model_name_or_path") == config.name_or_path:
        return None  # stored so, and named by the adapter
    if here == trained or (trained == _FOUR_BITS and here in ("nf4", "fp4")) or (trained is None and here == FULL):
        return None
    if trained is None:
        return (
            f"The base model is in {here}, and nothing beside {folder.name!r} says that the adapter was trained "
            f"on that form. If it was trained on another one, what is measured here is not what it does there."
        )
    advice = f"pass --quantization {trained}" if trained in _CHOSEN else "pass the base model that it names"
    return (
        f"The adapter {folder.name!r} was trained on a base model in {trained}, and is measured on one in {here}: "
        f"what is measured here is not what it does there. For that, {advice}."
    )


def note_form(folder: Path, config: PreTrainedConfig | None) -> None:
    """Write into an adapter's card in which form its base model was, where that is a quantised one.

    The lines are those that PEFT means to write, and wrote once: 0.21 looks for them in the wrong place.

    Args:
        folder: of the adapter, with its card.
        config: of the base model.
    """
    if not isinstance(config, PreTrainedConfig) or form_of(config) == FULL:
        return
    card = folder / CARD_FILE
    before = card.read_text(encoding="utf-8") if card.is_file() else ""  # of a named adapter, PEFT writes it one above
    lines = [f"- {name}: {value}" for name, value in sorted(config.quantization_config.to_dict().items())]
    text = before + "\n".join(["", "## Training procedure", "", _NOTE, *lines, ""])
    card.write_text(text, encoding="utf-8")


def _form_trained_on(folder: AdapterFolder) -> str | None:
    """As far as the adapter says it: its model card, into which PEFT writes it, or what its base model is called."""
    card = folder.path / CARD_FILE
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    noted: dict[str, Any] = dict(re.findall(r"^- (\w+): (\w+)\s*$", text, flags=re.MULTILINE))
    if "quant_method" in noted or "load_in_4bit" in noted:
        said = {name: value for name, value in noted.items() if value.lower() not in ("false", "none")}
        form = form_of({"quantization_config": said})
        return None if form in ("bitsandbytes", "unknown", FULL) else form
    name = str(folder.config.get("base_model_name_or_path") or "")
    for place in (folder.path / name, Path(name)) if name else ():
        with suppress(OSError, ValueError):  # whatever the folder is, another one is measured on
            form = form_of(json.loads((place / "config.json").read_text(encoding="utf-8")))
            if form != FULL:  # a full one may have been quantised when it was loaded
                return form
    return next((form for pattern, form in _NAMES.items() if re.search(pattern, name.rstrip("/"))), None)


def keep_packing_(model: nn.Module) -> None:
    """Let bitsandbytes leave its weights as they are packed.

    Processors with bfloat16 units would get them in another order, in place, in the first pass without gradients: from
    then on no gradient passes through a layer, and no word is said.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # pyright: ignore[reportArgumentType]


def scales_of(model: nn.Module) -> dict[str, Tensor]:
    """The scales of quantised weights, without which their numbers say little, by the weight's name."""
    found: dict[str, Tensor | None] = {}
    for name, module in model.named_modules():
        weight, state = vars(module)["_parameters"].get("weight"), vars(module).get("state")
        if (packed := getattr(weight, "quant_state", None)) is not None:
            found[f"{name}.weight"] = packed.absmax
        else:  # the first pass takes them from the weight to the module
            scales = getattr(weight, "SCB", None)
            found[f"{name}.weight"] = getattr(state, "SCB", None) if scales is None else scales
    return {name: scales for name, scales in found.items() if scales is not None}


def shared_states(model: nn.Module) -> list[Any]:
    """What modules keep of quantised weights beside the weights themselves, and what a copy can share."""
    kept = [vars(module).get(name) for module in model.modules() for name in ("quant_state", "state")]
    return [one for one in kept if type(one).__module__.startswith("bitsandbytes.")]
