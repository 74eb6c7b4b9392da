"""schedule="every-step" takes the published WeightLoRA update: over 50 steps the gates are equal to 1e-5.

The competitor is a plain transcription: a layer that makes the dense product of each site, AdamW on A and B, a step of
eta = 5 on omega from the same backward pass, and the K largest signed omegas. lorazor gates stock PEFT instead. Both
start from the same LoRA and see the same batches, on a small random Llama, and on a small random DeBERTa-v2 with a
trained classification head. Signed projection is switched on in lorazor for this comparison only. Weights are float64
and gates float32 on both sides: in float32 the roundings of two ways to compute a product may choose other sites after
some steps; that difference is reported for a fresh LoRA.

Also reported: where lorazor's own projection, by magnitude, would keep other sites, and what the published choice rests
on. It starts fresh (B = 0), as published, and with a random B, as training goes on from an adapter.

    python benchmarks/every_step_is_the_published_update.py [--steps 50]
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _machine import record, say
from _published_weightlora import GATE_LEARNING_RATE, PublishedUpdate, install_published_, keep_largest_signed
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from lorazor.adapter.sites import LiveSite, find_sites, site_parameters
from lorazor.select.projection import keep_largest, sites_for_count
from lorazor.select.scores import probe_of_step
from lorazor.select.weightlora import Gates, WeightLoraSettings
from lorazor.train.gating import GatedSites

LARGEST_DIFFERENCE = 1e-5
LEARNING_RATE = 1e-3
SHARE_KEPT = 1 / 3
FAMILIES = ("llama", "deberta-v2")
STARTS = ("fresh", "random B")
TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "deberta-v2": ["query_proj", "key_proj", "value_proj", "output.dense", "intermediate.dense"],
}
SHAPE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "initializer_range": 0.2,  # with the usual 0.02 a random model answers all inputs alike
}


@dataclass(frozen=True)
class Case:
    """A start and the batches that follow: what both sides are given."""

    base: PreTrainedModel
    model: PeftModel
    sites: list[LiveSite]
    batches: Sequence[dict[str, Tensor]]

    @property
    def budget(self) -> int:
        return round(SHARE_KEPT * len(self.sites))


def main() -> None:
    arguments = _arguments()
    cases = {}
    for family in FAMILIES:
        for start in STARTS:
            cases[f"{family}, {start}"] = found = compare(family, start, arguments)
            say(f"{family}, {start}: the gates differ by at most {found['largest_difference']:.1e}")
    largest = max(case["largest_difference"] for case in cases.values())
    document = {
        "n_steps": arguments.steps,
        "gate_lr": GATE_LEARNING_RATE,
        "largest_difference": largest,
        "limit": LARGEST_DIFFERENCE,
        "holds": largest <= LARGEST_DIFFERENCE,
        "an_example": example(),
        "cases": cases,
    }
    record(document, arguments.out)
    if largest > LARGEST_DIFFERENCE:
        raise SystemExit(f"The gates differ by {largest:.1e} from those of the published update.")


def compare(family: str, start: str, arguments: argparse.Namespace) -> dict[str, Any]:
    case = make_case(family, start, arguments, torch.float64)
    published = published_gates(case)
    gates, moved = lorazor_gates(case)
    difference = (gates - published).abs().amax(1)
    document = {
        "n_sites": len(case.sites),
        "budget": case.budget,
        "largest_difference": float(difference.max()),
        "furthest_gate": float((published[published != 0] - 1).abs().max()),
        "is_same_choice_in_every_step": torch.equal(gates != 0, published != 0),
        "magnitude": where_magnitude_differs(moved, case.budget),
        "published_choice": what_it_rests_on(case, published),
    }
    if start == "fresh":
        single = make_case(family, start, arguments, torch.float32)
        in_float32 = (lorazor_gates(single)[0] - published_gates(single)).abs().max()
        document["largest_difference_in_float32"] = float(in_float32)
    return document


def published_gates(case: Case) -> Tensor:
    """The gates of the transcription after each step, (n_steps, n_sites)."""
    model = copy.deepcopy(case.base)
    factors = {site.name: tuple(site_parameters(site.module, site.adapter)) for site in case.sites}
    layers = install_published_(model, factors, case.sites[0].scaling)
    head = [parameter for name, parameter in model.named_parameters() if name.startswith("classifier.")]
    update = PublishedUpdate(layers, case.budget, LEARNING_RATE, [factor.requires_grad_() for factor in head])
    path = []
    for batch in case.batches:
        model(**batch).loss.backward()
        path.append(update.step())
    return torch.tensor(path)


def lorazor_gates(case: Case) -> tuple[Tensor, Tensor]:
    """The gates of lorazor after each step, and what they were before the projection, (n_steps, n_sites) both."""
    model, path, unprojected = copy.deepcopy(case.model), [], []
    sites = find_sites(model)

    def projection(moved: Tensor, budget: int) -> Tensor:
        unprojected.append(moved.clone())
        return keep_largest_signed(moved, budget)

    settings = WeightLoraSettings(
        keep=case.budget,
        select_steps=len(case.batches),
        schedule="every-step",
        gate_lr=GATE_LEARNING_RATE,
        dense_steps=0,
    )
    gated = GatedSites(sites, Gates(len(sites), settings, projection=projection))
    gated.attach_()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.01)
    for batch in case.batches:
        model(**batch).loss.backward()
        gated.gates.step(gated.take_gradient())
        gated.update_()
        optimizer.step()
        optimizer.zero_grad()
        path.append(gated.gates.values.detach().clone())
    return torch.stack(path), torch.stack(unprojected)


def example() -> dict[str, Any]:
    gates = torch.tensor([-3.0, 0.5, 0.2, -0.1, 1.0], dtype=torch.float64)
    keeps = {"signed": keep_largest_signed, "magnitude": keep_largest}
    return {"gates": gates.tolist(), "budget": 2} | {name: keep(gates, 2).tolist() for name, keep in keeps.items()}


def where_magnitude_differs(moved: Tensor, budget: int) -> dict[str, Any]:
    """Steps of the signed path at which the larger magnitudes are other sites, and the most negative gate dropped."""
    chosen = [[keep(gates, budget) != 0 for keep in (keep_largest_signed, keep_largest)] for gates in moved]
    steps = [step for step, (signed, magnitude) in enumerate(chosen, 1) if not torch.equal(signed, magnitude)]
    if not steps:
        return {"n_steps_with_other_sites": 0}
    most_negative = {step: float(moved[step - 1].min()) for step in steps}
    step = min(most_negative, key=most_negative.__getitem__)
    kept = moved[step - 1][chosen[step - 1][0]]
    return {
        "n_steps_with_other_sites": len(steps),
        "first_such_step": steps[0],
        "most_negative_gate_dropped": {
            "step": step,
            "gate": most_negative[step],
            "smallest_gate_kept": float(kept.min()),
        },
    }


def what_it_rests_on(case: Case, published: Tensor) -> dict[str, Any]:
    """When the published choice changed, and what it has in common with two choices that need no warm-up."""
    kept = published != 0
    changed = (kept[1:] != kept[:-1]).any(1).nonzero().flatten() + 2
    model = copy.deepcopy(case.model)
    model(**case.batches[0]).loss.backward()
    factors = [site_parameters(site.module, site.adapter) for site in find_sites(model)]
    probe = sites_for_count(probe_of_step([site[1].grad for site in factors]), case.budget)
    return {
        "steps_that_changed_it": changed.tolist(),
        "n_in_common_with_first_step_probe": int((kept[-1] & probe).sum()),
        "n_in_common_with_first_sites_in_order": int(kept[-1, : case.budget].sum()),
    }


def make_case(family: str, start: str, arguments: argparse.Namespace, dtype: torch.dtype) -> Case:
    """The base model as it is and in stock PEFT, and the batches."""
    torch.manual_seed(arguments.seed)
    if family == "llama":
        base: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**SHAPE))
    else:
        no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3}
        positions = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
        base = DebertaV2ForSequenceClassification(DebertaV2Config(**SHAPE, **no_dropout, **positions))
    base = base.to(dtype).requires_grad_(False)
    task = "CAUSAL_LM" if family == "llama" else "SEQ_CLS"  # which trains the head too
    config = LoraConfig(r=8, lora_alpha=32, target_modules=TARGETS[family], task_type=task)
    model = get_peft_model(copy.deepcopy(base), config).to(dtype)
    sites = find_sites(model)
    for site in sites if start == "random B" else []:
        nn.init.normal_(site_parameters(site.module, site.adapter)[1], std=0.05)
    return Case(base, model, sites, make_batches(family, arguments))  # pyright: ignore[reportArgumentType]


def make_batches(family: str, arguments: argparse.Namespace) -> list[dict[str, Tensor]]:
    """Rows that count upwards by a step of their own: to be continued, or to be told apart by that step."""
    generator = torch.Generator().manual_seed(arguments.seed)
    batches = []
    for _ in range(arguments.steps):
        increments = torch.randint(3, (8, 1), generator=generator)
        starts = torch.randint(SHAPE["vocab_size"] - 1, (8, 1), generator=generator)
        tokens = 1 + (starts + (1 + increments) * torch.arange(12)) % (SHAPE["vocab_size"] - 1)  # 0 is padding
        batches.append({"input_ids": tokens, "labels": tokens if family == "llama" else increments.flatten()})
    return batches


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=50, help="steps of the warm-up, all of them projected")
    parser.add_argument("--seed", type=int, default=0, help="seed of models, LoRA and batches")
    parser.add_argument("--out", type=Path, help="also write the result to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
