"""Runs of shrink on the tiny model, and their losses by stock PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorazor.settings import DataSettings, ShrinkSettings
from lorazor.workflow.shrink import ShrinkResult, shrink
from tests.workflow.planted import Planted

READING = DataSettings(batch_size=4)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def stock_losses(base: Path, adapter: Path | None, data: str) -> dict[int, float]:
    """Nats of every answer, by stock PEFT on a fresh base, or that base alone, and torch's own cross entropy."""
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    model = (model if adapter is None else PeftModel.from_pretrained(model, adapter)).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    found = {}
    for index, row in enumerate(rows(Path(data))):
        prompt, answer = (tokenizer(row[key])["input_ids"] for key in ("prompt", "completion"))
        ids = torch.tensor([[*prompt, *answer, tokenizer.eos_token_id]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        found[index] = float(cross_entropy(logits, ids[0, len(prompt) :], reduction="sum"))
    return found


def run_losses(out: Path, prefix: str = "") -> dict[int, float]:
    """Those that the run has of what it chose."""
    chosen = json.loads((out / "shrink.json").read_text())["chosen"]
    return {one["example"]: one["nll_nats"] for one in rows(out / f"{prefix}losses.jsonl") if one["adapter"] == chosen}


def run(one: Planted, out: Path, confirm: bool = False, **settings: Any) -> ShrinkResult:
    everything = ShrinkSettings(**{"reading": READING, "points": 2, **settings})
    return shrink(one.adapter, one.data, out=out, confirm=one.held_out if confirm else None, settings=everything)
