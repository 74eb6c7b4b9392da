"""Run a GGUF adapter in llama.cpp, in its own environment: a job as JSON on stdin, the result in a file."""

from __future__ import annotations

import json
import sys
from typing import Any


def main(job: dict[str, Any]) -> list[dict[str, float]]:
    """Log-probabilities of the likeliest next tokens of each prompt."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = job["base"]
    params.n_ctx, params.n_parallel, params.warmup = 256, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    if job["adapter"]:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(job["adapter"], 1.0)]
    server, found = xllamacpp.Server(params), []
    for ids in job["prompts"]:
        answer = server.handle_completions(
            {
                "prompt": ids,
                "n_predict": 1,
                "temperature": 0,
                "n_probs": job["top"],
                "logprobs": job["top"],
                "cache_prompt": False,
            }
        )
        answer = answer[-1] if isinstance(answer, tuple) else answer
        answer = json.loads(answer) if isinstance(answer, str) else answer
        top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        found.append({str(one["id"]): one["logprob"] for one in top})
    return found


if __name__ == "__main__":
    result = main(json.load(sys.stdin))
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        json.dump(result, file)
