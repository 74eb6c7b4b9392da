"""Load adapters with SGLang's own classes, without GPU or server: a job as JSON on stdin, what came of it in a file.

What runs is `srt/lora/lora.py` (names, joining of q, k and v, and of gate and up), `lora_config.py` and the look-up of
target modules with which `mem_pool.py` begins a batch. Kernels and buffers take a GPU.
"""

from __future__ import annotations

import json
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

UNUSED = (
    "sglang.srt.configs.load_config",
    "sglang.srt.lora.backend.base_backend",
    "sglang.srt.model_executor.forward_batch_info",
    "sglang.srt.model_loader.loader",
    "sglang.srt.utils.hf_transformers_utils",
)
"""What its files import, and nothing here looks at: it drags in kernels, and packages for images and grammars."""


class StandIn(ModuleType):
    """A module that has every name."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__, self.__path__ = ModuleSpec(name, None), []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=name)


def only_lora_() -> None:
    """Have the package's files at hand without what its `__init__` files import."""
    spec = find_spec("sglang")
    assert spec is not None and spec.submodule_search_locations
    root = Path(spec.submodule_search_locations[0])
    for name in ("sglang", "sglang.srt", "sglang.srt.lora", "sglang.srt.layers"):
        package = ModuleType(name)
        package.__path__ = [str(root.parent.joinpath(*name.split(".")))]
        sys.modules[name] = package
    sys.modules.update({name: StandIn(name) for name in UNUSED})


def main(job: dict[str, Any]) -> dict[str, Any]:
    """Of each adapter the error, if any, and when it comes; or names and shapes of what would be in buffers."""
    only_lora_()
    from safetensors.torch import load_file
    from sglang.srt.lora.lora import LoRAAdapter
    from sglang.srt.lora.lora_config import LoRAConfig
    from sglang.srt.lora.utils import get_normalized_target_modules, get_stacked_multiply, get_target_module_name

    found = {}
    for name, path in job["adapters"].items():
        when = "loading"
        try:
            config = LoRAConfig(path)
            targets = get_normalized_target_modules(config.target_modules)
            base: Any = SimpleNamespace(num_hidden_layers=job["n_layers"])
            backend: Any = None  # computes, which nothing does here
            adapter = LoRAAdapter(name, config, base, backend, backend)
            adapter.initialize_weights_from_tensors(load_file(f"{path}/adapter_model.safetensors"))
            when = "the first batch"
            shapes = {}
            for layer in adapter.layers:
                for key, weight in layer.weights.items():
                    stacked = get_stacked_multiply(get_target_module_name(key, targets))
                    rank = weight.shape[0] / stacked if "lora_A" in key else weight.shape[-1]
                    assert rank == config.r or weight.dim() < 2, (
                        f"LoRA buffer of rank {config.r} does not match {tuple(weight.shape)}"
                    )
                    shapes[key] = list(weight.shape)
            found[name] = {"shapes": shapes, "scaling": adapter.scaling, "use_dora": config.use_dora}
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}", "when": when}
    return found


if __name__ == "__main__":
    result = main(json.load(sys.stdin))
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        json.dump(result, file)
