"""The curves against models whose hidden states are taken out and put through norm and head by hand."""

from __future__ import annotations

import copy
from dataclasses import replace
from operator import attrgetter
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GraniteConfig, GraniteForCausalLM, LlamaConfig, LlamaForSequenceClassification

from lorazor.adapter.sites import choose_stack, find_sites
from lorazor.data.batches import IGNORED
from lorazor.errors import MeasureError, SettingsError
from lorazor.measure.curves import VARIANTS, CurveRow, check_stack, collect_curves, curve_batch
from tests.measure.test_engines import tiny_batch
from tests.tiers import fast_first
from tests.tiny_models import FAMILIES, SEQ2SEQ, randomise_b_, tiny_peft_model

N_LAYERS = 3
# The final norm of each family, and its head; the defaults are Llama's.
NORMS = {
    "gpt2": "transformer.ln_f",
    "opt": "model.decoder.final_layer_norm",
    "t5": "decoder.final_layer_norm",
    "whisper": "model.decoder.layer_norm",
}


def logits_by_hand(base, batch, family: str) -> list[torch.Tensor]:
    """Full logits after 0, 1, ..., L layers: (rows, tokens, vocabulary) each, or (rows, classes)."""
    with torch.no_grad():
        output = base(**batch.inputs, output_hidden_states=True)
        hidden = output.decoder_hidden_states if family in SEQ2SEQ else output.hidden_states
        assert len(hidden) == N_LAYERS + 1
        return [*(head(base, state, family) for state in hidden[:-1]), output.logits]


def head(base, hidden: torch.Tensor, family: str) -> torch.Tensor:
    if family == "bert":
        return base.classifier(base.bert.pooler(hidden))
    if family == "deberta-v2":
        return base.classifier(base.pooler(hidden))
    if family == "bart":
        return base.lm_head(hidden) + base.final_logits_bias
    normed = attrgetter(NORMS.get(family, "model.norm"))(base)(hidden)
    if family == "whisper":
        return base.proj_out(normed)
    if family == "t5" and base.config.tie_word_embeddings:
        normed = normed * base.config.d_model**-0.5
    return base.lm_head(normed)


def rows_by_hand(logits: torch.Tensor, batch) -> list[tuple[float, float, list[int]]]:
    """Mean probability and entropy, and the ranks, of each row, token by token."""
    rows = []
    for scores, targets in zip(logits, batch.targets, strict=True):
        pairs = [(scores, targets)] if targets.ndim == 0 else zip(scores, targets, strict=True)
        answers = [(token_scores.softmax(-1), int(target)) for token_scores, target in pairs if target != IGNORED]
        truths = [p[target].item() for p, target in answers]
        entropies = [-(p * p.log()).sum().item() for p, _ in answers]
        ranks = [p.sort(descending=True).indices.tolist().index(target) + 1 for p, target in answers]
        rows.append((float(np.mean(truths)), float(np.mean(entropies)), ranks))
    return rows


def assert_equal_to_hand(peft_model, batch, family: str) -> None:
    sites = find_sites(peft_model)
    stack = choose_stack(sites)
    rows = curve_batch(peft_model.get_base_model(), sites, batch, stack)
    bases = {"adapter": peft_model, "base": without_all(peft_model)}
    expected = {variant: logits_by_hand(model.get_base_model(), batch, family) for variant, model in bases.items()}
    assert len(rows) == len(VARIANTS) * (N_LAYERS + 1) * len(batch.indices)
    for row in rows:
        mine = rows_by_hand(expected[row.variant][row.layer], batch)[batch.indices.index(row.example)]
        assert row.probability == pytest.approx(mine[0], abs=2e-6), row
        assert row.entropy_nats == pytest.approx(mine[1], abs=5e-6), row
        assert row.ranks == mine[2] and row.n_tokens == len(mine[2]), row
    at = {(row.variant, row.layer, row.example): row.probability for row in rows}
    for other in (("base", N_LAYERS), ("adapter", 0)):  # the adapter matters, and so do the layers
        assert max(abs(at["adapter", N_LAYERS, e] - at[(*other, e)]) for e in batch.indices) > 3e-5


def without_all(peft_model):
    """A copy with B = 0 everywhere, by hand."""
    changed = copy.deepcopy(peft_model)
    for name, parameter in changed.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    return changed


@pytest.mark.parametrize("family", fast_first(FAMILIES, "llama", "bart"))
def test_curves_equal_hidden_states_through_norm_and_head(family):
    assert_equal_to_hand(tiny_peft_model(family, n_layers=N_LAYERS), tiny_batch(family), family)


@pytest.mark.parametrize("cap", [0.05, 2.0])
def test_a_soft_cap_of_the_logits_counts(cap):
    model = tiny_peft_model("gemma3", n_layers=N_LAYERS)
    batch = tiny_batch("gemma3")
    plain = curve_batch(model.get_base_model(), find_sites(model), batch, "model.layers")
    model.get_base_model().config.final_logit_softcapping = cap
    capped = curve_batch(model.get_base_model(), find_sites(model), batch, "model.layers")
    raw = logits_by_hand(model.get_base_model(), batch, "gemma3")[1]
    expected = rows_by_hand(cap * torch.tanh(raw / cap), batch)
    mine = [row for row in capped if (row.variant, row.layer) == ("adapter", 1)]
    assert [row.probability for row in mine] == pytest.approx([row[0] for row in expected], abs=1e-5)
    assert abs(mine[0].entropy_nats - next(r for r in plain if r.layer == 1).entropy_nats) > 1e-5


def test_a_scale_of_the_logits_counts():
    torch.manual_seed(0)
    config = GraniteConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=N_LAYERS, num_attention_heads=4,
        num_key_value_heads=2, logits_scaling=0.25, embedding_multiplier=3.0, residual_multiplier=0.5,
    )  # fmt: skip
    model = get_peft_model(GraniteForCausalLM(config), LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    randomise_b_(model)
    batch = tiny_batch("llama")
    base = model.eval().get_base_model()
    rows = curve_batch(base, find_sites(model), batch, "model.layers")
    expected = rows_by_hand(logits_by_hand(base, batch, "llama")[2] / 0.25, batch)
    mine = [row.probability for row in rows if (row.variant, row.layer) == ("adapter", 2)]
    assert mine == pytest.approx([row[0] for row in expected], abs=1e-5)


def test_a_classifier_that_reads_the_last_token():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=N_LAYERS, num_attention_heads=4,
        num_key_value_heads=2, num_labels=3, pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="SEQ_CLS")
    model = get_peft_model(LlamaForSequenceClassification(config), lora)
    randomise_b_(model)
    batch = tiny_batch("bert")
    batch.inputs["input_ids"][1, 4:], batch.inputs["attention_mask"][1, 4:] = 0, 0
    base: Any = model.eval().get_base_model()
    rows = curve_batch(base, find_sites(model), batch, "model.layers")
    with torch.no_grad():
        hidden = base(**batch.inputs, output_hidden_states=True).hidden_states[1]
        scores = base.score(base.model.norm(hidden))  # (rows, tokens, classes)
    expected = rows_by_hand(scores[torch.arange(3), torch.tensor([6, 3, 6])], batch)
    mine = [row for row in rows if (row.variant, row.layer) == ("adapter", 1)]
    assert [row.probability for row in mine] == pytest.approx([row[0] for row in expected], abs=1e-5)


def test_layers_without_lora_are_in_the_curve_too():
    """LoRA on the first layer only: the curve still ends at the model's own output."""
    model = tiny_peft_model("llama", n_layers=N_LAYERS, target_modules=["layers.0.mlp.down_proj", "lm_head"])
    assert_equal_to_hand(model, tiny_batch("llama"), "llama")


def test_padding_and_long_answers_change_nothing(monkeypatch):
    model, batch = tiny_peft_model("llama", n_layers=N_LAYERS), tiny_batch("llama")
    whole = curve_batch(model.get_base_model(), find_sites(model), batch, "model.layers")
    monkeypatch.setattr("lorazor.measure.curves._TOKENS_AT_A_TIME", 2)
    inputs = {name: torch.nn.functional.pad(tensor, (0, 3)) for name, tensor in batch.inputs.items()}
    padded = replace(batch, inputs=inputs, targets=torch.nn.functional.pad(batch.targets, (0, 3), value=IGNORED))
    rows = curve_batch(model.get_base_model(), find_sites(model), padded, "model.layers")
    assert [row.probability for row in rows] == pytest.approx([row.probability for row in whole], abs=1e-6)
    assert [row.ranks for row in rows] == [row.ranks for row in whole]


def test_nothing_stays_on_the_model():
    model, batch = tiny_peft_model("t5", n_layers=N_LAYERS), tiny_batch("t5")
    sites = find_sites(model)
    curve_batch(model.get_base_model(), sites, batch, "decoder.block")
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert not any(site.module.disable_adapters for site in sites)


def test_a_model_whose_end_needs_the_layers_is_refused():
    """A model that ends with a second look at what its first layer said."""
    model = tiny_peft_model("llama", n_layers=N_LAYERS)
    base: Any = model.get_base_model()
    seen: list[torch.Tensor] = []
    base.model.layers[0].mlp.register_forward_hook(lambda module, args, output: seen.append(output))
    base.model.norm.register_forward_pre_hook(lambda module, args: (args[0] + seen.pop() if seen else args[0],))
    with pytest.raises(MeasureError, match="LlamaForCausalLM.*share state"):
        curve_batch(base, find_sites(model), tiny_batch("llama"), "model.layers")


def test_a_layer_that_runs_twice_is_refused():
    model = tiny_peft_model("llama", n_layers=N_LAYERS)
    base: Any = model.get_base_model()
    base.model.layers[1].forward = lambda hidden_states, *args, **kwargs: base.model.layers[2](hidden_states, **kwargs)
    with pytest.raises(MeasureError, match="3 layers run 4 times"):
        curve_batch(base, find_sites(model), tiny_batch("llama"), "model.layers")


def test_a_nan_names_example_and_layer():
    model = tiny_peft_model("llama", n_layers=N_LAYERS)
    sites = find_sites(model)
    next(site for site in sites if site.name == "model.layers.1.mlp.up_proj").module.lora_B[
        "default"
    ].weight.data.fill_(float("nan"))
    with pytest.raises(MeasureError, match=r"example 10 after layer 2 \(adapter\) is nan"):
        curve_batch(model.get_base_model(), sites, tiny_batch("llama"), "model.layers")


def test_the_encoder_of_an_encoder_decoder_is_refused():
    with pytest.raises(SettingsError, match="encoder.block.*decoder"):
        check_stack("encoder.block", is_encoder_decoder=True)
    check_stack("decoder.block", is_encoder_decoder=True)
    check_stack("bert.encoder.layer", is_encoder_decoder=False)


def test_rows_in_any_order_become_means_over_tokens():
    def row(variant: Any, layer: int, example: int, probability: float, ranks: list[int]) -> CurveRow:
        return CurveRow(example, variant, layer, len(ranks), probability, 2 * probability, ranks)

    rows = [row("base", layer, example, 0.0, [9] * n) for layer in (0, 1) for example, n in ((4, 1), (7, 3))]
    rows += [row("adapter", 0, 4, 0.8, [1]), row("adapter", 0, 7, 0.4, [2, 3, 8])]
    rows += [row("adapter", 1, 4, 0.5, [1]), row("adapter", 1, 7, 0.5, [1, 1, 2])]
    collected = collect_curves(reversed(rows))
    assert collected.examples == (4, 7) and collected.n_tokens.tolist() == [1, 3] and collected.n_layers == 1
    first, second, *base = collected.points()
    assert (first.variant, first.layer) == ("adapter", 0)
    assert first.probability == pytest.approx((0.8 + 3 * 0.4) / 4)
    # residuals n (v - m): 1 * 0.3 and 3 * -0.1; 2 / (2 - 1) * (0.09 + 0.09) = 0.36; its root over 4 tokens
    assert first.probability_standard_error == pytest.approx(0.6 / 4)
    assert (first.entropy_nats, first.entropy_standard_error) == pytest.approx((1.0, 0.3))
    assert first.median_rank == 2.5  # of 1, 2, 3, 8
    assert (second.probability, second.probability_standard_error) == (0.5, 0.0)
    assert {point.variant for point in base} == {"base"}
    gap, error = collected.gap()
    assert gap.tolist() == pytest.approx([0.5, 0.5]) and error.tolist() == pytest.approx([0.15, 0.0])
    with pytest.raises(MeasureError, match="example 7, layer 1, adapter"):
        collect_curves(rows[:-1])
