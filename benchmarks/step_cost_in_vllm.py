"""In vLLM an adapter on a tenth of the sites costs at most 1.3 times a step of no adapter, where it is told which.

The full adapter, of rank 8 on all linear maps of the layers, costs twice that, and 14 times the bytes of a slot, where
vLLM is told nothing but --enable-lora. One cut to rank 1 is measured beside it: it has the smallest slot of all, and
cost 1.2 to 1.7 from run to run on shared processors, so that nothing is claimed of it. The smaller forms are what
`lorazor export --for vllm` writes, with the flags that it prints. Each form has a server of its own in a process of
its own; all of them are loaded at once and take their rounds in turn, forwards and backwards, so that a machine that
slows down slows all alike. A round is a batch of prompts that are answered with a number of tokens, so nearly all of
it are steps of one token a row. What is judged is the median over the rounds of the ratio within a round. What a step
costs hangs on names and ranks, and not on the numbers: the adapters are random, and a rank of 1 is cut without
healing, unless --rank-1 names one. A log-probability of each says that its adapter was on; that they are right is what
`make test-serving` tests. vLLM has an environment of its own, which that makes.

    python benchmarks/step_cost_in_vllm.py --vllm ENVIRONMENT [--model FOLDER [--gguf-file NAME]] [--rounds 7]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _machine import record, say
from _training import SMOLLM2_SHAPE, load_base
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

import lorazor
from lorazor.serve.flags import Flags

LARGEST_RATIO, SMALLEST_RATIO_OF_FULL = 1.3, 1.7
SHARE_OF_SITES = 0.1
FULL, FEW = "full, not told", "10 % of the sites, told"
STANDARD_DEVIATION_OF_B = 0.02


@dataclass(frozen=True)
class Form:
    """What a server is given: a folder, if any, and options of `vllm.LLM`."""

    adapter: Path | None
    options: dict[str, Any]
    printed: int | None = None


class Server:
    """A server in a process of its own.

    Attributes:
        about: what it said when it was ready: slot bytes, log-probabilities, version.
    """

    def __init__(self, python: Path, base: Path, form: Form, arguments: argparse.Namespace) -> None:
        """Start it, and wait until it is ready."""
        script = Path(__file__).with_name("_steps_in_vllm.py")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
        self._process = subprocess.Popen([python, script], cwd=base, env=environment, **pipes)
        adapter = None if form.adapter is None else str(form.adapter)
        self.about = self.ask(
            {
                "base": str(base),
                "options": form.options,
                "adapter": adapter,
                "rows": arguments.rows,
                "steps": arguments.steps,
            }
        )

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """Write a line, and read the answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"vLLM ended with {self._process.wait()}. Run benchmarks/_steps_in_vllm.py by hand.")
        return json.loads(answer)

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


def main() -> None:
    arguments = _arguments()
    python = Path(arguments.vllm, "bin", "python").absolute()
    if not python.exists():
        raise SystemExit(f"{str(python)!r} is not there. --vllm is an environment with vLLM: make test-serving.")
    with tempfile.TemporaryDirectory() as root, ExitStack() as stack:
        base, forms = make_forms(Path(root), arguments)
        servers = {}
        for name, form in forms.items():
            say(f"starting: {name}")
            servers[name] = Server(python, base, form, arguments)
            stack.callback(servers[name].close)
        rounds = take_turns(servers, arguments.rounds)
        document = summary(forms, servers, rounds)
    record(
        {
            "rows": arguments.rows,
            "steps": arguments.steps,
            "threads": arguments.threads,
            "largest_ratio": LARGEST_RATIO,
            **document,
        },
        arguments.out,
    )


def make_forms(root: Path, arguments: argparse.Namespace) -> tuple[Path, dict[str, Form]]:
    """The base model as a folder that vLLM reads, and what each server is given."""
    model: PreTrainedModel = load_base(arguments, SMOLLM2_SHAPE).float()
    model.save_pretrained(root / "base")
    torch.manual_seed(arguments.seed)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    full = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in full.named_parameters():
            if "lora_B" in name:
                parameter.copy_(STANDARD_DEVIATION_OF_B * torch.randn(parameter.shape, generator=generator))
    full.save_pretrained(str(root / "full"), save_embedding_layers=False)
    settings = lorazor.ModelSettings(str(root / "base"))
    sites = lorazor.inspect(root / "full").sites
    chosen = torch.randperm(len(sites), generator=generator)[: round(SHARE_OF_SITES * len(sites))].tolist()
    entries = tuple(one.site.entry(index in chosen) for index, one in enumerate(sites))
    lorazor.prune(root / "full", lorazor.Selection(entries, "random", {}), out=root / "few")
    few = lorazor.export(root / "few", "vllm", out=root / "few-sites", verify=False, model=settings)
    source, rank = (root / "full", 1) if arguments.rank_1 is None else (arguments.rank_1, None)
    one = lorazor.export(source, "vllm", out=root / "rank-1", max_rank=rank, verify=False, model=settings)
    assert few.flags is not None and one.flags is not None
    return root / "base", {
        "no adapter": Form(None, {}),
        FULL: Form(root / "full", {"enable_lora": True, "max_loras": 1}),
        FEW: Form(few.path, _told(few.flags), few.flags.slot_bytes),
        "rank 1, told": Form(one.path, _told(one.flags), one.flags.slot_bytes),
    }


def _told(flags: Flags) -> dict[str, Any]:
    targets = {"lora_target_modules": list(flags.targets)} if flags.targets else {}
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": flags.max_rank, **targets}


def take_turns(servers: dict[str, Server], n_rounds: int) -> list[dict[str, dict[str, float]]]:
    """Rounds of all servers, forwards and backwards in turn."""
    found = []
    for index in range(n_rounds):
        order = list(servers) if index % 2 == 0 else list(reversed(servers))
        found.append({name: servers[name].ask({}) for name in order})
        say(f"round {index + 1}: " + ", ".join(f"{name} {found[-1][name]['seconds']:.2f} s" for name in servers))
    return found


def summary(
    forms: dict[str, Form], servers: dict[str, Server], rounds: list[dict[str, dict[str, float]]]
) -> dict[str, Any]:
    """Medians of the ratios within a round, by form, and whether the claim holds."""
    document: dict[str, Any] = {"vllm": servers["no adapter"].about["vllm"], "forms": {}}
    for name, form in forms.items():
        about = servers[name].about
        document["forms"][name] = {
            "slot_bytes": about["slot_bytes"],
            "slot_bytes_printed": form.printed,
            "first_log_probability": about["log_probabilities"][0],
            **{
                f"median_ratio_of_{kind}": median(one[name][kind] / one["no adapter"][kind] for one in rounds)
                for kind in ("seconds", "processor_seconds")
            },
            "seconds_by_round": [one[name]["seconds"] for one in rounds],
        }
    ratios = {name: one["median_ratio_of_seconds"] for name, one in document["forms"].items()}
    are_printed = all(form.printed in (None, servers[name].about["slot_bytes"]) for name, form in forms.items())
    document["holds"] = ratios[FEW] <= LARGEST_RATIO and ratios[FULL] >= SMALLEST_RATIO_OF_FULL and are_printed
    return document


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", required=True, help="environment with vLLM")
    parser.add_argument("--model", help="base model of Llama's kind; by default a random one of SmolLM2-135M's shape")
    parser.add_argument("--gguf-file", help="name of the GGUF file inside the --model folder")
    parser.add_argument(
        "--rank-1", help="adapter of rank 1 to measure, such as a healed one; by default one that is cut"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, default=4, help="prompts in a batch")
    parser.add_argument("--steps", type=int, default=24, help="tokens of an answer")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of A, and of the random model")
    parser.add_argument("--out", type=Path, help="also write the result here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
