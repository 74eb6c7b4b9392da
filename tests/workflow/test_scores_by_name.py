"""Scores reach the sites that they are of: planted truths, each of which fails where two lists differ in order."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from scipy.integrate import fixed_quad
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration, set_seed

import lorazor.workflow.score
import lorazor.workflow.subset
from lorazor.adapter.load import load
from lorazor.selection import Selection
from lorazor.settings import ScoreMethod, ScoreSettings, SearchSettings, SubsetBudgetSettings
from lorazor.workflow.prune import Choice, prune_adapter
from lorazor.workflow.score import score_adapter
from lorazor.workflow.subset import find_subset
from lorazor.workflow.variants import SubsetSettings
from tests.workflow.test_tasks import SIZES, save

METHODS: tuple[ScoreMethod, ...] = ("credit", "taylor", "output-norm", "norm")
LLAMA = ("model.layers.1.self_attn.q_proj", "model.layers.2.self_attn.o_proj", "model.layers.1.mlp.down_proj")
T5 = ("encoder.block.0.layer.0.SelfAttention.q", "decoder.block.1.layer.2.DenseReluDense.wo")


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def t5(tmp_path_factory) -> tuple[Path, Path]:
    """An adapter on every linear map of a T5, and data."""
    set_seed(0)
    config = T5Config(
        d_model=16, d_kv=8, d_ff=16, num_layers=2, num_decoder_layers=2, num_heads=2, decoder_start_token_id=0, **SIZES
    )
    data = [{"prompt": f"after {n}", "completion": f"{n + 1}"} for n in range(4)]
    targets = ["q", "k", "v", "o", "wi", "wo"]
    root = tmp_path_factory.mktemp("t5")
    return save(root, T5ForConditionalGeneration(config), data, target_modules=targets, task_type="SEQ_2_SEQ_LM")


def with_one_live_site(adapter: Path, live: str, to: Path) -> Path:
    """The adapter with B = 0 at every site but one."""
    shutil.copytree(adapter, to)
    tensors = load_file(to / "adapter_model.safetensors")
    for key, tensor in tensors.items():
        if "lora_B" in key and key != f"base_model.model.{live}.lora_B.weight":
            tensor.zero_()
    save_file(tensors, to / "adapter_model.safetensors", metadata={"format": "pt"})
    return to


@pytest.fixture(params=["one order", "live sites in reverse"])
def order(request, monkeypatch) -> str:
    """The loaded model gives its sites in the order of the folder, and then in another one: no score may move."""
    if request.param != "one order":
        for module in (lorazor.workflow.score, lorazor.workflow.subset):

            def reversed_load(*arguments):
                loaded = load(*arguments)
                loaded.sites.reverse()
                return loaded

            monkeypatch.setattr(module, "load", reversed_load)
    return request.param


@pytest.mark.parametrize(("family", "live"), [*(("llama", live) for live in LLAMA), *(("t5", live) for live in T5)])
def test_the_one_site_that_does_anything_has_the_only_score(tiny, t5, tmp_path, order, family, live):
    adapter, data = (tiny.adapter, tiny.validation) if family == "llama" else t5
    planted = with_one_live_site(adapter, live, tmp_path / "planted")
    for method in METHODS:
        run, small = tmp_path / method, tmp_path / f"{method}-small"
        scoring = ScoreSettings(method, points=1, score_examples=2)
        score_adapter(planted, None if method == "norm" else str(data), run, scoring)
        assert {row["site"] for row in rows(run / "scores.jsonl") if row["score"] != 0} == {live}, method
        _, chosen = prune_adapter(planted, small, Choice(scores=run, budget=SubsetBudgetSettings(keep=1)))
        assert [site.name for site in chosen.kept] == [live], method


@pytest.mark.parametrize("method", ["norm", "credit"])
@pytest.mark.parametrize("ranks", ["keep", "mixed"])
def test_a_subset_keeps_the_one_site_that_does_anything(tiny, out, tmp_path, order, method, ranks):
    live = LLAMA[0]
    planted = with_one_live_site(tiny.adapter, live, tmp_path / "planted")
    n_parameters = 4 * (32 + 32)  # what the site has
    settings = SubsetSettings(
        SubsetBudgetSettings(params=n_parameters),
        ScoreSettings(method, points=1, score_examples=2),
        SearchSettings(ranks=ranks, baselines=True),
    )
    find_subset(planted, str(tiny.validation), out, settings=settings)
    assert [site.name for site in Selection.load(out / "selection.json").kept] == [live]
    assert {row["site"] for row in rows(out / "scores.jsonl") if row["score"] != 0} == {live}
    found = json.loads((out / "subset.json").read_text())
    norm = next(one for one in found["baselines"] if one["label"] == "norm")
    assert norm["n_parameters"] == found["chosen"]["n_parameters"]
    if found["chosen"]["n_parameters"] == n_parameters:  # the others change nothing
        assert norm["value"] == found["chosen"]["value"] == pytest.approx(found["full"]["value"], abs=1e-6)
    else:  # two of its components have negative credit
        assert (method, ranks) == ("credit", "mixed")


def test_credits_are_the_integrals_of_the_slopes_by_name(tiny, out, order):
    """Against PEFT's own scale of the site of that name, the loss by hand, and scipy's quadrature."""
    n_points = 2
    score_adapter(tiny.adapter, str(tiny.validation), out, ScoreSettings(points=n_points, score_examples=3))
    loaded = load(tiny.adapter)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny.base), tiny.adapter).eval()
    modules: Any = model.named_modules()
    layers = {name.removeprefix("base_model.model."): one for name, one in modules if hasattr(one, "set_scale")}
    texts = []
    for example in rows(tiny.validation)[:3]:
        prompt = loaded.tokenizer(example["prompt"])["input_ids"]
        answer = loaded.tokenizer(example["completion"])["input_ids"]
        texts.append((len(prompt), torch.tensor([[*prompt, *answer, loaded.tokenizer.eos_token_id]])))

    def slopes(position: float) -> dict[str, float]:
        scales = {name: torch.tensor(float(position), requires_grad=True) for name in layers}
        for name, layer in layers.items():
            layer.set_scale("default", scales[name])
        nats = 0.0
        for n_prompt, ids in texts:
            logits = model(input_ids=ids).logits[0, n_prompt - 1 : -1]
            nats = nats + cross_entropy(logits, ids[0, n_prompt:], reduction="sum")
        nats = nats / sum(ids.shape[1] - n_prompt for n_prompt, ids in texts)
        gradients = torch.autograd.grad(nats, list(scales.values()))
        return dict(zip(scales, map(float, gradients), strict=True))

    found = {row["site"]: row["score"] for row in rows(out / "scores.jsonl")}
    assert found.keys() == layers.keys()
    expected = fixed_quad(
        lambda positions: torch.tensor([list(slopes(p).values()) for p in positions]).double().numpy().T,
        0, 1, n=n_points,
    )[0]  # fmt: skip
    assert [found[name] for name in layers] == pytest.approx([-value for value in expected], rel=1e-3, abs=1e-6)
