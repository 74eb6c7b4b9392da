"""Scores fit where training fits: credit peaks at 1.1 times a forward-backward pass of LoRA at most, balanced at 1.2.

A pass is forward and backward of the same LoRA model on the same rows with the same loss of the answer tokens, base
frozen, A and B trained; a training step is that and AdamW. The model has the width of Llama-3-8B (hidden 4096, inner
14336, 32 heads, 8 of keys and values), two layers and 32,000 tokens, random, in bfloat16; the rows are 8 times 512
tokens, the second half the answer. Each runs in a process of its own, whose peak is what the system saw; what autograd
keeps of one forward pass of one row is counted by itself, since weights and libraries are a large part of the peak.

    python benchmarks/scores_fit_in_memory.py [--hidden-size 4096] [--rows 8] [--tokens 512]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _machine import record, say
from _training import counting_saved_bytes
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from lorazor.adapter.directions import to_balanced_form_
from lorazor.adapter.parts import Parts
from lorazor.adapter.sites import LiveSite, find_sites
from lorazor.data.batches import IGNORED, Batch
from lorazor.measure.gradients import gram_matrices
from lorazor.measure.losses import differentiable_row_losses
from lorazor.select.credit import path_credit

LARGEST = {"credit": ("pass", 1.1), "balanced": ("step", 1.2)}
"""What each is compared with, and the largest ratio of the peaks."""
POINTS = 2
"""Of the path of credit; each pass is like the one before."""


def main() -> None:
    arguments = _arguments()
    if arguments.run:
        print(json.dumps(measured(arguments)))
        return
    found = {name: _in_a_process(name) for name in RUNS}
    ratios = {
        name: {what: found[name][what] / found[other][what] for what in found[name]}
        for name, (other, _) in LARGEST.items()
    }
    holds = all(ratios[name]["peak_bytes"] <= largest for name, (_, largest) in LARGEST.items())
    shape = {name: getattr(arguments, name) for name in ("hidden_size", "n_layers", "rows", "tokens", "rank")}
    record({"shape": shape, "holds": holds, "ratios": ratios} | found, arguments.out)
    if not holds:
        raise SystemExit(f"Scores take more memory than they may: {ratios}.")


def measured(arguments: argparse.Namespace) -> dict[str, float]:
    """Peaks of one run: of the process, above the model's own, and what autograd kept."""
    model = _model(arguments)
    sites, before = find_sites(model), _peak_bytes()
    RUNS[arguments.run](model, sites, _batch(arguments, arguments.rows), POINTS)
    peak = _peak_bytes()
    with counting_saved_bytes(model) as count:
        RUNS[arguments.run](model, sites, _batch(arguments, 1), 1)
    return {"peak_bytes": peak, "peak_above_model_bytes": peak - before, "saved_bytes_of_a_row": count()}


def plain_pass(model: PeftModel, sites: list[LiveSite], batch: Batch, n_points: int) -> None:
    """The competitor: gradients of A and B."""
    differentiable_row_losses(_base(model), batch).nll_nats.sum().backward()


def training_step(model: PeftModel, sites: list[LiveSite], batch: Batch, n_points: int) -> None:
    """The same, and a step of AdamW."""
    optimizer = torch.optim.AdamW(one for one in model.parameters() if one.requires_grad)
    plain_pass(model, sites, batch, n_points)
    optimizer.step()


def credit(model: PeftModel, sites: list[LiveSite], batch: Batch, n_points: int) -> None:
    """Credit of all directions, in the basis that is there."""
    parts = Parts(tuple(sites))
    path_credit(_base(model), [batch], parts.gated, torch.ones(len(parts)), n_points)


def balanced(model: PeftModel, sites: list[LiveSite], batch: Batch, n_points: int) -> None:
    """sigma^2 of all directions, and the basis in which they are."""
    to_balanced_form_(sites, gram_matrices(_base(model), sites, [batch]))


RUNS: dict[str, Callable[[PeftModel, list[LiveSite], Batch, int], None]] = {
    "pass": plain_pass,
    "step": training_step,
    "credit": credit,
    "balanced": balanced,
}


def _base(model: PeftModel) -> LlamaForCausalLM:
    return model.get_base_model()  # pyright: ignore[reportReturnType]


def _model(arguments: argparse.Namespace) -> PeftModel:
    """Made in bfloat16, so that nothing before the pass takes more memory than the pass."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    n_heads = arguments.hidden_size // 128
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=arguments.hidden_size,
        intermediate_size=arguments.hidden_size * 7 // 2,
        num_hidden_layers=arguments.n_layers,
        num_attention_heads=n_heads,
        num_key_value_heads=n_heads // 4,
    )
    rank = arguments.rank
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = get_peft_model(LlamaForCausalLM(config), lora).eval()  # pyright: ignore[reportArgumentType]
    torch.set_default_dtype(torch.float32)
    for site in find_sites(model):
        torch.nn.init.normal_(site.module.lora_B[site.adapter].weight, std=0.02)
    return model


def _batch(arguments: argparse.Namespace, rows: int) -> Batch:
    tokens = torch.randint(32000, (rows, arguments.tokens))
    targets = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], IGNORED)], dim=1)
    targets[:, : arguments.tokens // 2] = IGNORED
    return Batch(tuple(range(rows)), {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, targets)


def _in_a_process(name: str) -> dict[str, float]:
    say(name)
    done = subprocess.run([sys.executable, *sys.argv, "--run", name], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _peak_bytes() -> int:
    """Of this process so far; in units of 1024 bytes on Linux."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--hidden-size", type=int, default=4096)
    parser.add_argument("--n-layers", type=int, default=2)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512, help="of a row")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--out", type=Path, help="also write the result to this file")
    parser.add_argument("--run", choices=RUNS, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
