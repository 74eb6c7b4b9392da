"""Healing from the full adapter: the divergence by hand, by stock PEFT on two models that share nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lorazor.adapter.live import twin_of
from lorazor.adapter.load import load
from lorazor.errors import DataError, SettingsError
from lorazor.settings import DataSettings, GenerationSettings, ShrinkSettings
from lorazor.workflow.shrink import shrink
from tests.workflow.planted import change
from tests.workflow.shrinking import rows, run, run_losses, stock_losses

HEALING: dict[str, Any] = {"heal_from": "full", "heal_steps": 12, "heal_lr": 5e-3, "params_fraction": 0.1}
EVERYTHING = DataSettings(batch_size=16)  # all rows in every step


def divergence(full: Tensor, smaller: Tensor) -> float:
    """sum_v P(v) (log P(v) - log Q(v)), over positions; logits (positions, vocabulary)."""
    p, q = full.double().softmax(-1), smaller.double().softmax(-1)
    return float((p * (p.log() - q.log())).sum())


def divergence_by_hand(base: Path, full: Path, smaller: Path, pairs: list[tuple[str, str]]) -> float:
    """Mean over the answer tokens, end included; each row by itself."""
    models: list[Any] = [
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), one).eval() for one in (full, smaller)
    ]
    tokenizer, total, n_tokens = AutoTokenizer.from_pretrained(base), 0.0, 0
    for prompt, answer in pairs:
        first, second = tokenizer(prompt)["input_ids"], [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            seen = [one(torch.tensor([first + second])).logits[0, len(first) - 1 : -1] for one in models]
        total, n_tokens = total + divergence(*seen), n_tokens + len(second)
    return total / n_tokens


def losses(out: Path) -> list[float]:
    return [entry["loss"] for entry in rows(out / "healing.jsonl")]


def test_the_first_loss_is_the_divergence_and_it_falls(tiny, gaining, train, tmp_path, monkeypatch):
    """In one pass, and shared among four with checkpointing."""
    monkeypatch.setattr("lorazor.workflow.heal.Healing._is_better", lambda *_: True)  # labels may like it less
    shares = {"params_fraction": 0.1, "reading": EVERYTHING}
    smaller = run(gaining, tmp_path / "smaller", **shares)
    assert smaller.pruned is not None
    pairs = [(row["prompt"], row["completion"]) for row in rows(Path(train))]
    expected = divergence_by_hand(tiny.base, gaining.adapter, smaller.pruned.path, pairs)
    for name, more in (("one", {}), ("four", {"heal_accumulation": 4, "gradient_checkpointing": True})):
        out = tmp_path / name
        result = run(gaining, out, heal=train, **HEALING | {"reading": EVERYTHING} | more)
        found = losses(out)
        assert found[0] == pytest.approx(expected, rel=1e-3) and found[-1] < 0.7 * found[0]
        assert result.pruned is not None and result.pruned.path == out / "adapter"
        assert divergence_by_hand(tiny.base, gaining.adapter, result.pruned.path, pairs) < 0.7 * expected
        assert run_losses(out) == pytest.approx(stock_losses(tiny.base, out / "adapter", gaining.data), abs=1e-4)


def test_prompts_alone_get_the_answers_of_the_full_adapter(tiny, gaining, tmp_path):
    prompts = [f"after {number} comes" for number in range(40, 56)]
    source = tmp_path / "prompts.jsonl"
    source.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    out = tmp_path / "out"
    generation = GenerationSettings(max_new_tokens=5)
    run(gaining, out, heal=str(source), **HEALING | {"reading": EVERYTHING, "generation": generation})
    model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny.base), gaining.adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny.base)
    written = {row["example"]: row["text"] for row in rows(out / "heal-predictions.jsonl")}
    for index in (0, 7):
        ids = torch.tensor([tokenizer(prompts[index])["input_ids"]])
        tokens = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
        assert written[index] == tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)
    assert len(written) == 16 and losses(out)[-1] < losses(out)[0]


@pytest.mark.slow
@pytest.mark.parametrize("has_labels", [True, False])
def test_a_classifier_learns_the_logits_of_the_full_adapter(tmp_path, has_labels):
    """Of a model with dropout, which healing must not see."""
    from transformers import BertConfig, BertForSequenceClassification, set_seed

    from tests.workflow.test_tasks import SIZES, save

    set_seed(0)
    config = BertConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_labels=3,
        hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3, initializer_range=0.5, **SIZES,
    )  # fmt: skip
    texts = [{"text": f"number {n}", "label": n % 3} for n in range(9)]
    adapter, data = save(
        tmp_path, BertForSequenceClassification(config), texts, target_modules=["query", "value"], task_type="SEQ_CLS"
    )
    adapter = change(adapter, tmp_path / "stronger", lambda site, A, B: (A, 20 * B))
    others = [f"other {n}" for n in range(8)]
    source = tmp_path / "others.jsonl"
    source.write_text(
        "".join(json.dumps({"text": one} | ({"label": 1} if has_labels else {})) + "\n" for one in others)
    )
    shared = {"params_fraction": 0.3, "score": "balanced", "reading": DataSettings(batch_size=8)}
    smaller = shrink(adapter, str(data), out=tmp_path / "a", settings=ShrinkSettings(**shared)).pruned
    assert smaller is not None
    settings = ShrinkSettings(**shared, heal=str(source), heal_from="full", heal_steps=4, heal_lr=1e-3)
    shrink(adapter, str(data), out=tmp_path / "b", settings=settings)
    tokenizer, expected = AutoTokenizer.from_pretrained(tmp_path / "base"), 0.0
    models: list[Any] = []
    for one in (adapter, smaller.path):
        base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
        models.append(PeftModel.from_pretrained(base, one).eval())
    for text in others:
        with torch.no_grad():
            seen = [one(**tokenizer(text, return_tensors="pt")).logits for one in models]
        expected += divergence(*seen) / len(others)
    assert losses(tmp_path / "b")[0] == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"heal_from": "labels"}, SettingsError, "heal_from='labels' says how to heal. Pass --heal"),
        ({"heal": "{prompts}", "heal_from": "labels"}, DataError, "the columns are 'prompt', but lorazor needs one of"),
        ({"heal": "{prompts}", "heal_from": "full"}, DataError, "has 2 examples, and a step of healing reads 4"),
    ],
)
def test_what_cannot_work_is_said_before_the_model_is_loaded(
    gaining, out, tmp_path, monkeypatch, settings, error, message
):
    monkeypatch.setattr("lorazor.workflow.opening.load", lambda *_: pytest.fail("the model was loaded"))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a new one"}\n{"prompt": "another"}\n')
    settings = {key: str(prompts) if value == "{prompts}" else value for key, value in settings.items()}
    with pytest.raises(error, match=message):
        run(gaining, out, params_fraction=0.5, **settings)


def test_a_twin_shares_the_base_and_nothing_else(gaining):
    loaded = load(gaining.adapter)
    assert loaded.peft_model is not None
    twin = twin_of(loaded.peft_model)
    ids = torch.arange(5, 20)[None]
    with torch.no_grad():
        before = loaded.peft_model(input_ids=ids).logits
        assert torch.equal(twin(input_ids=ids).logits, before)
        own = dict(twin.named_parameters())
        for name, parameter in loaded.peft_model.named_parameters():
            assert (own[name].data_ptr() == parameter.data_ptr()) == ("lora_" not in name)
            assert own[name] is not parameter
            if "lora_B" in name:
                own[name].zero_()
        twin.unload()
        twin.train()
        assert torch.equal(loaded.peft_model(input_ids=ids).logits, before) and not loaded.peft_model.training
