"""Both engines against models whose LoRA weights were zeroed by hand."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from peft import get_peft_model
from transformers import BartForSequenceClassification

from lorazor.adapter.sites import choose_stack, find_sites, stack_sizes
from lorazor.data.batches import IGNORED, Batch
from lorazor.measure.engines import NotForkable, choose_engine, failure, naive_losses, on_model, one_pass_losses
from lorazor.measure.losses import row_losses
from tests.odd_models import odd_inputs, odd_peft_model
from tests.tiers import fast_first
from tests.tiny_models import (
    CLASSIFIERS,
    FAMILIES,
    SEQ2SEQ,
    lora_config,
    randomise_b_,
    tiny_inputs,
    tiny_model,
    tiny_peft_model,
)

N_LAYERS = 3
ENGINES = {"naive": naive_losses, "one-pass": one_pass_losses}


def tiny_batch(family: str, rows: int = 3) -> Batch:
    """Random inputs, padded on the right, with the last few tokens of each row as the answer."""
    inputs = tiny_inputs(family, rows=rows)
    generator = torch.Generator().manual_seed(1)
    if family in CLASSIFIERS:
        targets = torch.randint(0, 2, (rows,), generator=generator)
    else:
        tokens = inputs["decoder_input_ids" if family in SEQ2SEQ else "input_ids"]
        targets = torch.randint(0, 64, tokens.shape, generator=generator)
        targets[:, :2] = IGNORED
        targets[0, 4:] = IGNORED
    return Batch(indices=tuple(range(10, 10 + rows)), inputs=inputs, targets=targets)


def losses_by_hand(model, batch: Batch) -> tuple[list[float], list[int]]:
    """Negative log-likelihood and right tokens of each row, from the full logits, token by token."""
    with torch.no_grad():
        logits = model(**batch.inputs).logits
    nll, correct = [], []
    for row, targets in zip(logits, batch.targets, strict=True):
        pairs = [(row, targets)] if targets.ndim == 0 else zip(row, targets, strict=True)
        answers = [(scores, int(target)) for scores, target in pairs if target != IGNORED]
        nll.append(sum(-torch.log_softmax(scores, -1)[target].item() for scores, target in answers))
        correct.append(sum(int(scores.argmax()) == target for scores, target in answers))
    return nll, correct


def without_layers_from(model, stack: str, boundary: int):
    """A copy of the model with B = 0 in the layers from the boundary on."""
    changed = copy.deepcopy(model)
    for name, parameter in changed.named_parameters():
        for layer in range(boundary, 64):
            if "lora_B" in name and f".{stack}.{layer}." in name:
                parameter.data.zero_()
    return changed


@pytest.mark.parametrize("family", fast_first(FAMILIES, "llama", "t5"))
def test_both_engines_equal_zeroed_weights(family):
    model = tiny_peft_model(family, n_layers=N_LAYERS).eval()
    sites, batch = find_sites(model), tiny_batch(family)
    for stack in stack_sizes(sites):
        boundaries = range(N_LAYERS + 1)
        expected = {b: losses_by_hand(without_layers_from(model, stack, b), batch) for b in boundaries}
        assert abs(sum(expected[0][0]) - sum(expected[N_LAYERS][0])) > 5e-3  # the adapter matters
        for engine in ("naive", "one-pass"):
            base = model.get_base_model()
            found = ENGINES[engine](base, sites, on_model(base, batch, stack), stack, boundaries)
            assert list(found) == list(boundaries)
            for boundary, losses in found.items():
                assert losses.nll_nats.tolist() == pytest.approx(expected[boundary][0], abs=1e-4)
                assert losses.n_correct.tolist() == expected[boundary][1]


@pytest.mark.parametrize("family", FAMILIES)
def test_one_pass_is_chosen(family):
    model = tiny_peft_model(family, n_layers=N_LAYERS).eval()
    sites = find_sites(model)
    engine, _ = choose_engine(model.get_base_model(), sites, tiny_batch(family), choose_stack(sites), range(4))
    assert engine == "one-pass"


def test_naive_is_chosen_where_layers_share_state():
    """Layers that add the sum of what all layers before them saw: a fork does not see the layers it skips."""
    model = tiny_peft_model("llama", n_layers=N_LAYERS).eval()
    base = model.get_base_model()
    seen: list[torch.Tensor] = []

    def leak(module, args, output):
        seen.append(output)
        return output + 0.5 * sum(seen[-N_LAYERS:])

    for layer in base.model.layers:
        layer.mlp.register_forward_hook(leak)
    engine, reason = choose_engine(base, find_sites(model), tiny_batch("llama"), "model.layers", range(4))
    assert engine == "naive"
    assert "share state" in reason


@pytest.mark.parametrize(
    ("family", "engine", "message"),
    [
        ("gemma3n", "naive", "one-pass fails on this model (KeyError: 'sliding_attention')"),
        ("gemma4", "naive", "one-pass fails on this model (KeyError: 'sliding_attention')"),
        ("mllama", "one-pass", "agrees with naive on the first batch at boundaries 0, 1, 2"),
        ("funnel", "naive", "this model calls none of the layers in front of which one-pass would fork"),
        ("qwen2-moe", "one-pass", "agrees with naive on the first batch at boundaries 0, 1, 2"),
    ],
)
def test_layers_that_share_or_are_not_called(family, engine, message):
    """Keys and values of a layer below, layers for pictures without pictures, blocks that are lists of layers."""
    model, inputs = odd_peft_model(family), odd_inputs(family)
    batch = replace(tiny_batch("bert" if family == "funnel" else "llama"), inputs=inputs)
    base, sites = model.get_base_model(), find_sites(model)
    stack = choose_stack(sites)
    boundaries = range(stack_sizes(sites)[stack] + 1)
    assert choose_engine(base, sites, batch, stack, boundaries) == (engine, message)
    expected = {b: losses_by_hand(without_layers_from(model, stack, b), batch) for b in boundaries}
    assert abs(sum(expected[0][0]) - sum(expected[boundaries[-1]][0])) > 5e-3  # the adapter matters
    found = ENGINES[engine](base, sites, batch, stack, boundaries)
    for boundary in boundaries:
        assert found[boundary].nll_nats.tolist() == pytest.approx(expected[boundary][0], abs=1e-4)
    if engine == "naive":
        with pytest.raises((NotForkable, KeyError)) as failed:
            one_pass_losses(base, sites, batch, stack, boundaries)
        assert failure(failed.value) == message  # pyright: ignore[reportArgumentType]


def test_a_layer_that_runs_twice_is_measured_naively():
    model = tiny_peft_model("llama", n_layers=N_LAYERS).eval()
    base, sites, batch = model.get_base_model(), find_sites(model), tiny_batch("llama")
    base.model.layers.append(base.model.layers[1])
    base.model.config.num_hidden_layers = N_LAYERS + 1
    base.model.config.layer_types = ["full_attention"] * (N_LAYERS + 1)
    engine, reason = choose_engine(base, sites, batch, "model.layers", range(N_LAYERS + 1))
    assert (engine, reason) == ("naive", "layer 1 of this model runs again, or after a later one")


def test_an_error_of_the_model_itself_is_not_taken_for_one_of_the_engine():
    model = tiny_peft_model("llama", n_layers=N_LAYERS).eval()
    base, sites = model.get_base_model(), find_sites(model)

    def fail(*_):
        raise ZeroDivisionError("on purpose")

    base.model.layers[1].register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError, match="on purpose"):
        choose_engine(base, sites, tiny_batch("llama"), "model.layers", range(N_LAYERS + 1))


def test_sites_outside_the_stack_stay_on():
    model = tiny_peft_model("llama", n_layers=N_LAYERS, target_modules=["q_proj", "lm_head"]).eval()
    sites, batch = find_sites(model), tiny_batch("llama")
    found = one_pass_losses(model.get_base_model(), sites, batch, "model.layers", [0])
    nll, _ = losses_by_hand(without_layers_from(model, "model.layers", 0), batch)
    assert found[0].nll_nats.tolist() == pytest.approx(nll, abs=1e-4)


def test_classifiers_on_encoder_decoders():
    config = tiny_model("bart", n_layers=2).config
    config.num_labels = 3
    model = get_peft_model(BartForSequenceClassification(config), lora_config("bart", task_type="SEQ_CLS")).eval()
    randomise_b_(model)
    batch = tiny_batch("bert")
    batch.inputs["input_ids"][:, -1] = config.eos_token_id  # whose state is classified
    base, sites, stack = model.get_base_model(), find_sites(model), "model.decoder.layers"
    ready = on_model(base, batch, stack)
    engine, _ = choose_engine(base, sites, ready, stack, range(3))
    for boundary, losses in ENGINES[engine](base, sites, ready, stack, range(3)).items():
        expected, _ = losses_by_hand(without_layers_from(model, stack, boundary), batch)
        assert losses.nll_nats.tolist() == pytest.approx(expected, abs=1e-5)


def test_engines_agree_in_bfloat16():
    model = tiny_peft_model("llama", n_layers=N_LAYERS).eval().to(torch.bfloat16)
    sites, batch = find_sites(model), tiny_batch("llama")
    arguments = (model.get_base_model(), sites, batch, "model.layers", range(4))
    naive, fast = naive_losses(*arguments), one_pass_losses(*arguments)
    for boundary in range(4):
        assert fast[boundary].nll_nats.tolist() == pytest.approx(naive[boundary].nll_nats.tolist(), rel=1e-3)


def test_of_equal_logits_the_first_is_chosen():
    """In bfloat16 many tokens share the highest logit; the model still says one of them, as torch.argmax does."""
    model = tiny_peft_model("llama", n_layers=1).eval().to(torch.bfloat16)
    batch = tiny_batch("llama")
    with torch.no_grad():
        model.get_base_model().lm_head.weight[1::2] = model.get_base_model().lm_head.weight[::2]  # 2k and 2k + 1 tie
        logits = model(**batch.inputs).logits
    is_answer = batch.targets != IGNORED
    chosen = logits.argmax(dim=-1)
    for shift, expected in ((0, is_answer.sum(dim=1)), (1, torch.zeros(3))):
        batch.targets[is_answer] = chosen[is_answer] + shift
        assert torch.equal(row_losses(model, batch).n_correct, expected.double())
        found = naive_losses(model.get_base_model(), find_sites(model), batch, "model.layers", [1])
        assert found[1].n_correct.tolist() == expected.tolist()


def test_nothing_of_one_pass_stays_on_the_model():
    model = tiny_peft_model("llama", n_layers=N_LAYERS).eval()
    sites, batch = find_sites(model), tiny_batch("llama")
    before = losses_by_hand(model, batch)
    one_pass_losses(model.get_base_model(), sites, batch, "model.layers", range(4))
    assert losses_by_hand(model, batch) == before
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
