"""Credits of a batch against every row by itself on stock PEFT: set_scale, the model's own logits and gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy

from lorazor.adapter.gates import split_rows
from lorazor.adapter.parts import Parts
from lorazor.adapter.sites import Site, find_sites
from lorazor.data.batches import IGNORED, Batch
from lorazor.errors import RowsUnclearError
from lorazor.select.credit import path_credit
from tests.measure.test_engines import tiny_batch
from tests.odd_models import CLASSIFIERS, odd_inputs, odd_peft_model
from tests.tiny_models import lora_config, randomise_b_, tiny_model, tiny_peft_model

ROUTED = ("switch", "nllb-moe")
TIME_FIRST = ("fsmt", "xlnet", "longformer")
OTHERS = ("qwen2-moe", "albert", "gemma3n", "mllama", "funnel")


def odd_batch(family: str, rows: int = 3, tokens: int = 7) -> Batch:
    inputs = odd_inputs(family, rows, tokens)
    generator = torch.Generator().manual_seed(1)
    if family in CLASSIFIERS:
        targets = torch.randint(0, 3, (rows,), generator=generator)
    else:
        targets = torch.randint(0, 64, (rows, tokens), generator=generator)
        targets[:, :2] = IGNORED
        targets[0, 4:] = IGNORED
    return Batch(tuple(range(10, 10 + rows)), inputs, targets)


def nats(model, inputs: dict[str, Tensor], targets: Tensor) -> Tensor:
    """Negative log-likelihood of one row; FSMT is causal only without its cache."""
    logits = model(**inputs, **({"use_cache": False} if targets.ndim else {})).logits
    return cross_entropy(
        logits.reshape(-1, logits.shape[-1]).float(), targets.reshape(-1), ignore_index=IGNORED, reduction="sum"
    )


def credits_of_rows_alone(model, batch: Batch, n_points: int) -> np.ndarray:
    """(rows, n_sites), with one gate per site through PEFT's own scale."""
    sites = find_sites(model)
    nodes, weights = np.polynomial.legendre.leggauss(n_points)
    credits = np.zeros((len(batch.indices), len(sites)))
    for row in range(len(batch.indices)):
        inputs = {name: one[row : row + 1] for name, one in batch.inputs.items()}
        for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
            gates = [torch.tensor(float(node), requires_grad=True) for _ in sites]
            for site, gate in zip(sites, gates, strict=True):
                site.module.set_scale("default", gate)  # pyright: ignore[reportArgumentType]
            loss = nats(model, inputs, batch.targets[row])
            slopes: Any = torch.autograd.grad(loss, gates, allow_unused=True)
            credits[row] -= weight * np.array([0.0 if slope is None else float(slope) for slope in slopes])
    for site in sites:
        site.module.set_scale("default", 1.0)
    return credits


def with_head(is_tied: bool) -> PeftModel:
    """Llama with LoRA on its output layer too, whose weights are perhaps those of the embedding."""
    base = tiny_model("llama", 2)
    if is_tied:
        base.config.tie_word_embeddings = True
        base.tie_weights()
        assert base.lm_head.weight is base.model.embed_tokens.weight
    targets = ["q_proj", "down_proj", "lm_head"]
    config = lora_config("llama", 2, target_modules=targets, ensure_weight_tying=is_tied)
    model: Any = get_peft_model(base, config)
    randomise_b_(model, seed=3)
    return model.eval()


def check_rows(model, batch: Batch, messages: list[str]) -> None:
    """Credits of all parts of a site together are those of every row alone."""
    parts, expected = Parts(tuple(find_sites(model))), credits_of_rows_alone(model, batch, 2)
    assert np.abs(expected).max() > 1e-3
    found = path_credit(
        model.get_base_model(), [batch], parts.gated, torch.ones(len(parts)), 2, on_message=messages.append
    )
    assert found.examples == batch.indices
    of_sites = np.zeros_like(expected)
    np.add.at(of_sites.T, np.array(parts.site_of), found.credits.T)
    np.testing.assert_allclose(of_sites, expected, atol=2e-5, rtol=2e-3)


@pytest.mark.parametrize(
    ("family", "tokens"),
    [("xlnet", 3), ("qwen2-moe", 7)]
    + [
        pytest.param(family, tokens, marks=pytest.mark.slow)
        for family in (*ROUTED, *TIME_FIRST, *OTHERS)
        for tokens in (8, 3)
        if (family, tokens) != ("xlnet", 3)
    ],
)
def test_a_row_earns_in_a_batch_what_it_earns_alone(family, tokens):
    messages = []
    check_rows(odd_peft_model(family), odd_batch(family, rows=3, tokens=tokens), messages)
    together = family in OTHERS and tokens != 3
    assert (
        [message.split(":")[0] for message in messages] == []
        if together
        else ["Batches are taken apart, which is slower"]
    )


@pytest.mark.parametrize("n_answers", [(2, 4, 5), (2, 4, 3)], ids=["no multiple of the rows", "a multiple"])
@pytest.mark.parametrize("is_tied", [False, True], ids=["its own weights", "tied"])
def test_the_output_layer_sees_rows(n_answers, is_tied):
    model, batch = with_head(is_tied), tiny_batch("llama")
    for row, n in enumerate(n_answers):
        batch.targets[row] = IGNORED
        batch.targets[row, 1 : 1 + n] = batch.inputs["input_ids"][row, 2 : 2 + n]
    messages = []
    check_rows(model, batch, messages)
    assert messages == []


@pytest.mark.parametrize(
    ("family", "embedding", "n_tokens", "n_messages"),
    [("llama", "embed_tokens", 7, 0), ("t5", "relative_attention_bias", 3, 1), ("gpt2", "wpe", 7, 1)],
)
def test_embeddings_have_credits_too(family, embedding, n_tokens, n_messages):
    """Of tokens, of distances (tokens, tokens), here as many as rows, and of positions (1, tokens)."""
    model, batch = tiny_peft_model(family, 1, target_modules=[embedding]), tiny_batch(family)
    first = {name: tensor[:, :n_tokens] for name, tensor in batch.inputs.items()}
    messages = []
    check_rows(model, replace(batch, inputs=first, targets=batch.targets[:, :n_tokens]), messages)
    assert len(messages) == n_messages


@pytest.mark.parametrize("shape", [(4, 5, 2), (20, 2), (5, 4, 2), (4, 4, 2), (21, 2), (24, 2), (4, 2), (1, 20, 2)])
def test_only_what_cannot_be_otherwise_is_rows(shape):
    """Four rows of five tokens; the positions of a row, or a refusal."""
    inside = Site("model.layers.0.mlp.fc1", "model.layers", 0, "mlp.fc1", 2, 1.0, 1)
    expert = replace(inside, name="model.layers.0.mlp.experts.0.fc1")
    outside = replace(inside, name="pooler.dense", stack=None, layer=None)
    accepted = {(4, 5, 2): (inside, expert, outside), (20, 2): (inside, outside), (4, 2): (outside,)}
    output = torch.randn(shape)
    for site in (inside, expert, outside):
        if site in accepted.get(shape, ()):
            assert torch.equal(split_rows(output, 4, site, {5}), output.reshape(4, -1, 2))
        else:
            with pytest.raises(RowsUnclearError, match=f"{site.name}.*4 rows"):
                split_rows(output, 4, site, {5})
        assert split_rows(output, 1, site, {5}).shape == (1, output.numel() // 2, 2)
