"""What lorazor makes smaller, or trains small, in vLLM 0.32.0: all at once in one batch, and through its server."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import lorazor
from tests.data.test_batches import byte_tokenizer
from tests.serving.running import environment, largest_difference, log_probabilities, run_in, smollm2_in_float32
from tests.tiny_models import randomise_b_
from tests.workflow.planted import answers_of, plant, write_pairs

pytestmark = pytest.mark.serving
PROMPTS = [[(7 * row + 11 * token) % 250 + 3 for token in range(4 + row % 5)] for row in range(24)]


@pytest.fixture(scope="module", params=["tiny", "SmolLM2-135M"])
def base(request, tmp_path_factory) -> Path:
    """A tiny random Llama with a tokenizer, whose heads are as wide as vLLM's kernels want; and a real one."""
    path, tokenizer = tmp_path_factory.mktemp("llama") / request.param, byte_tokenizer()
    if request.param != "tiny":
        for part in smollm2_in_float32():
            part.save_pretrained(path)
        return path
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.1, tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def exported(base, tmp_path_factory) -> dict[str, Path]:
    """Adapters of every origin, exported for vLLM."""
    root = tmp_path_factory.mktemp("adapters")
    config = LoraConfig(r=8, lora_alpha=12, use_rslora=True, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
    randomise_b_(model, size=0.2 if base.name == "tiny" else 0.02)
    model.save_pretrained(str(root / "full"))
    planted = plant(base, root / "full", root)
    prompts = [f"after {number} comes" for number in range(40, 48)]
    rows = write_pairs(root / "train.jsonl", prompts, answers_of(base, root / "full", prompts))
    reading = lorazor.DataSettings(batch_size=4)
    shrink = {
        "mixed ranks": {"params_fraction": 0.3},
        "uniform ranks": {"max_rank": 2, "uniform": True},
        "rank 1": {"server": "vllm", "max_rank": 1},
        "few sites": {"server": "vllm", "params_fraction": 0.1},
        "few layers": {"by": "layer", "params_fraction": 0.5},
        "boundary": {"by": "prefix", "params_fraction": 0.5},
    }
    made = {}
    for name, settings in shrink.items():
        made[name] = lorazor.shrink(planted.adapter, out=root / name, **settings).out / "adapter"
    healed = lorazor.shrink(
        planted.adapter, planted.data, out=root / "healed", heal=rows, heal_steps=4, heal_lr=1e-3, params_fraction=0.3,
        points=1, reading=reading,
    )  # fmt: skip
    assert healed.pruned is not None and "healed" in healed.reason
    made["healed"] = healed.out / "adapter"
    for method in ("weightlora", "weightlora+"):
        settings = lorazor.TrainSettings(
            method=method,
            model=lorazor.ModelSettings(str(base)),
            batch_size=2,
            lora=lorazor.LoraSettings(rank=2, alpha=4),
            fit=lorazor.FitSettings(steps=9, learning_rate=0.05, rise_steps=2),
            budget=lorazor.BudgetSettings(keep=5),
            choosing=lorazor.ChoosingSettings(select_steps=4),
        )
        lorazor.train_adapter(rows, out=root / method, settings=settings)
        made[method] = root / method
    settings = lorazor.ExportSettings(model=lorazor.ModelSettings(str(base)))
    return {
        name: lorazor.export(path, "vllm", out=root / "exported" / name.replace(" ", "-"), settings=settings).path
        for name, path in made.items()
    }


def check(found: dict[str, Any], base: Path, adapter: Path) -> None:
    """Compare what a server said with stock PEFT; and PEFT with the base, so that an adapter left out is seen."""
    expected, without = log_probabilities(base, adapter, PROMPTS), log_probabilities(base, None, PROMPTS)
    assert largest_difference(found["logprobs"], expected) < 1e-3
    assert largest_difference(found["logprobs"], without) > 1e-2
    assert found["tokens"] == [int(row.argmax()) for row in expected]


def test_all_at_once_with_the_flags_of_the_fleet(base, exported, tmp_path):
    flags = lorazor.plan_fleet([*exported.values()], "vllm", model=str(base)).flags
    told = {"max_lora_rank": flags.max_rank, "lora_target_modules": list(flags.targets)}
    folders = {name: str(path) for name, path in exported.items()}
    job = {"base": str(base), "options": told, "adapters": folders, "together": True, "prompts": PROMPTS, "top": 20}
    found = run_in("VLLM", "in_vllm.py", job, tmp_path / "result.json")
    assert found["slot_bytes"] == flags.slot_bytes
    for name, path in exported.items():
        check(found["results"][name], base, path)


def test_a_client_of_its_http_server_gets_the_same(base, exported, tmp_path):
    chosen = {name: exported[name] for name in ("few sites", "weightlora+")}
    flags = lorazor.plan_fleet([*chosen.values()], "vllm", model=str(base)).flags
    with served(base, {name.replace(" ", "-"): path for name, path in chosen.items()}, flags.words(), tmp_path) as url:
        for name, path in chosen.items():
            rows = [complete(url, name.replace(" ", "-"), ids) for ids in PROMPTS]
            found = {"logprobs": rows, "tokens": [int(max(row, key=row.__getitem__)) for row in rows]}
            check(found, base, path)
        with pytest.raises(urllib.error.HTTPError):
            complete(url, "no-such-adapter", PROMPTS[0])


def complete(url: str, adapter: str, ids: list[int]) -> dict[str, float]:
    """Log-probabilities of the likeliest next tokens."""
    body = {"model": adapter, "prompt": ids, "max_tokens": 1, "temperature": 0, "logprobs": 5}
    body["return_tokens_as_token_ids"] = True
    data = json.dumps(body).encode()
    request = urllib.request.Request(f"{url}/v1/completions", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        top = json.load(answer)["choices"][0]["logprobs"]["top_logprobs"][0]
    return {token.removeprefix("token_id:"): value for token, value in top.items()}


@contextmanager
def served(base: Path, adapters: dict[str, Path], flags: list[str], place: Path) -> Iterator[str]:
    """VLLM's server with adapters, as a user starts it; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [environment("VLLM"), "-m", "vllm.entrypoints.openai.api_server", "--model", str(base), *flags]
    command += ["--lora-modules", *(f"{name}={path}" for name, path in adapters.items()), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--max-model-len", "128"]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    settings |= {"HF_HUB_OFFLINE": "1"}
    with (place / "server.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=place, env={**os.environ, **settings})
        try:
            _wait(f"http://127.0.0.1:{port}/health", server, place / "server.log")
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(timeout=60)


def _wait(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + 300
    while time.monotonic() < until:
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    pytest.fail(f"The server did not answer: {log.read_text()[-3000:]}")
