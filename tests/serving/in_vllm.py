"""Run adapters in vLLM, in its own environment: reads a job as JSON on stdin, writes what came of it to a file.

The job has `base`, `options` of `vllm.LLM`, `adapters` (folders by name), `prompts` (lists of tokens), and `top`. With
`together`, all adapters are in one batch.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the model is looked at from here
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def slot_bytes(model: Any) -> int:
    """Bytes of A and B of one slot, over all modules that are wrapped."""
    stacks = [
        getattr(module, name, None) for module in model.modules() for name in ("lora_a_stacked", "lora_b_stacked")
    ]
    tensors = [one for stack in stacks if stack is not None for one in (stack if isinstance(stack, tuple) else [stack])]
    return sum(one[0].numel() * one.element_size() for one in tensors)


def main(job: dict[str, Any]) -> dict[str, Any]:
    """What the server makes of each adapter, and the bytes of its slots."""
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.lora.request import LoRARequest

    llm = LLM(
        job["base"], dtype="float32", enable_lora=True, enforce_eager=True, max_model_len=128, max_num_seqs=8,
        max_loras=len(job["adapters"]) if job.get("together") else 1, skip_tokenizer_init=True, **job["options"],
    )  # fmt: skip
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in job["prompts"]]
    once = SamplingParams(max_tokens=1, temperature=0, logprobs=job["top"], detokenize=False)
    found: dict[str, Any] = {"slot_bytes": llm.apply_model(slot_bytes)[0], "results": {}}
    requests = {name: LoRARequest(name, number, path) for number, (name, path) in enumerate(job["adapters"].items(), 1)}
    if job.get("together"):
        each = [(prompt, request) for request in requests.values() for prompt in prompts]
        outputs = llm.generate([one for one, _ in each], once, lora_request=[one for _, one in each], use_tqdm=False)
        for index, name in enumerate(requests):
            found["results"][name] = said(outputs[index * len(prompts) :][: len(prompts)])
        return found
    for name, request in requests.items():
        try:
            llm.llm_engine.add_lora(request)  # a prompt with a refused adapter would wait in the server for ever
        except Exception as error:
            found["results"][name] = {"error": f"{type(error).__name__}: {error}"}
            continue
        outputs = llm.generate(prompts, once, lora_request=request, use_tqdm=False)
        found["results"][name] = said(outputs)
    return found


def said(outputs: list[Any]) -> dict[str, Any]:
    """The tokens that came out, and the likeliest ones."""
    return {
        "logprobs": [{token: one.logprob for token, one in row.outputs[0].logprobs[0].items()} for row in outputs],
        "tokens": [row.outputs[0].token_ids[0] for row in outputs],
    }


if __name__ == "__main__":
    result = main(json.load(sys.stdin))
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        json.dump(result, file)
