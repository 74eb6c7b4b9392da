"""Pairs of texts, names of classes and numbers, from training to measuring, against transformers' own classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from scipy import stats
from tokenizers import processors
from transformers import AutoConfig, BertConfig, BertForSequenceClassification, BertModel, set_seed

from lorazor.data.batches import make_batches
from lorazor.data.examples import Example
from lorazor.errors import DataError, SettingsError
from lorazor.measure.losses import row_losses
from lorazor.settings import DataSettings, FitSettings, ModelSettings
from lorazor.workflow.boundary import find_boundary
from lorazor.workflow.evaluate import evaluate
from lorazor.workflow.shrink import shrink
from lorazor.workflow.train import train_adapter
from tests.data.test_batches import byte_tokenizer

SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"vocab_size": 320, "pad_token_id": 0, "eos_token_id": 2}


def pair_tokenizer() -> Any:
    """One that tells the second text of a pair by its token types, as BERT's does."""
    tokenizer: Any = byte_tokenizer(
        None, model_max_length=24, model_input_names=["input_ids", "token_type_ids", "attention_mask"]
    )
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<bos>", "<eos>")]
    pair = "<bos> $A <eos> $B:1 <eos>:1"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", pair=pair, special_tokens=ids
    )
    return tokenizer


@pytest.fixture
def base(tmp_path: Path) -> str:
    set_seed(0)
    pair_tokenizer().save_pretrained(tmp_path / "base")
    BertModel(BertConfig(**SIZES)).save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def train(base: str, data: str, out: Path, **fields: Any) -> Path:
    fit = FitSettings(steps=3, learning_rate=0.05, rise_steps=0)
    return train_adapter(data, out=out, fit=fit, batch_size=4, model=ModelSettings(model=base), **fields).out


def stock(base: str, adapter: Path) -> Any:
    """The adapter in stock PEFT, with the head that its folder's config.json describes."""
    config = AutoConfig.from_pretrained(adapter)
    model = BertForSequenceClassification.from_pretrained(base, config=config)
    return PeftModel.from_pretrained(model, adapter).eval()


def logits(model: Any, rows: list[dict[str, Any]]) -> torch.Tensor:
    tokens = pair_tokenizer()(
        [row["sentence1"] for row in rows], [row["sentence2"] for row in rows], truncation=True, padding=True,
        return_tensors="pt",
    )  # fmt: skip
    with torch.no_grad():
        return model(**tokens).logits


ROWS = [{"sentence1": f"number {n}", "sentence2": f"{n % 3} is {n}" * (1 + n % 4)} for n in range(12)]


@pytest.mark.parametrize("is_number", [False, True])
def test_batches_and_losses_are_those_of_run_glue(is_number: bool) -> None:
    """`run_glue.py`: tokenizer(text, pair, truncation=True), and the loss of the model itself."""
    set_seed(0)
    model = BertForSequenceClassification(BertConfig(**SIZES, num_labels=1 if is_number else 3)).eval()
    labels = [n / 7 if is_number else n % 3 for n in range(len(ROWS))]
    examples = [
        Example(n, row["sentence1"], "", (), label, None, row["sentence2"])
        for n, (row, label) in enumerate(zip(ROWS, labels, strict=True))
    ]
    tokenizer = pair_tokenizer()
    encoding = make_batches(examples, tokenizer, "classification", len(ROWS), has_types=True)
    (batch,) = encoding.batches
    rows = [ROWS[index] for index in batch.indices]
    expected = pair_tokenizer()(
        [row["sentence1"] for row in rows], [row["sentence2"] for row in rows], truncation=True, padding=True,
        return_tensors="pt",
    )  # fmt: skip
    assert batch.inputs.keys() == expected.keys() and batch.inputs["token_type_ids"].any()
    assert all(torch.equal(batch.inputs[name], expected[name]) for name in expected)
    own = [pair_tokenizer()(row["sentence1"], row["sentence2"])["input_ids"] for row in ROWS]
    assert encoding.n_truncated == sum(len(one) > 24 for one in own) > 0
    assert tokenizer.backend_tokenizer.truncation is None  # as it was
    with torch.no_grad():
        loss = model(**expected, labels=torch.tensor([labels[index] for index in batch.indices])).loss
    assert row_losses(model, batch).nll_nats.mean().item() == pytest.approx(loss.item(), rel=1e-6)
    without = make_batches(examples, tokenizer, "classification", 4)  # a model that does not read them
    assert "token_type_ids" not in without.batches[0].inputs


def test_names_of_classes_stay_with_the_adapter(base: str, tmp_path: Path) -> None:
    """Trained on names, measured on some of the names in another order, and after a shrink."""
    names = ["neutral", "entailment", "contradiction"]
    named = [row | {"label": names[n % 3]} for n, row in enumerate(ROWS)]
    adapter = train(base, write(tmp_path / "train.jsonl", named), tmp_path / "adapter")
    config = AutoConfig.from_pretrained(adapter)
    assert config.id2label == dict(enumerate(sorted(names)))
    model = stock(base, adapter)
    some = [row for row in reversed(named) if row["label"] != "contradiction"]
    scores = logits(model, some).log_softmax(-1)
    true = torch.tensor([sorted(names).index(row["label"]) for row in some])
    result = evaluate(
        [adapter], write(tmp_path / "test.jsonl", some), out=tmp_path / "run", metrics="loss,accuracy,matthews"
    )
    loss, accuracy, matthews = (one.value for one in result.results)
    assert loss == pytest.approx(-scores[torch.arange(8), true].mean().item(), abs=1e-5)
    assert accuracy == pytest.approx((scores.argmax(-1) == true).float().mean().item())
    swept = find_boundary(
        adapter, tmp_path / "test.jsonl", out=tmp_path / "swept", select_by="matthews", rule="manual", boundary=1,
        engine="one-pass",
    )  # fmt: skip
    assert swept.choice.candidates[-1].value == pytest.approx(matthews)
    small = shrink(adapter, tmp_path / "test.jsonl", out=tmp_path / "shrunk", max_rank=2, score_examples=4)
    again = evaluate([small.pruned.path], tmp_path / "test.jsonl", out=tmp_path / "again")
    assert AutoConfig.from_pretrained(small.pruned.path).id2label == config.id2label and again.results[0].value > 0
    with pytest.raises(DataError, match="'other', but the head of .* has the classes 'contradiction', 'entailment'"):
        rows = [*named[:2], ROWS[0] | {"label": "other"}]
        evaluate([adapter], write(tmp_path / "other.jsonl", rows), out=tmp_path / "none")
    with pytest.raises(SettingsError, match="metric='f1' is of two classes, but .* has 3"):
        evaluate([adapter], tmp_path / "train.jsonl", out=tmp_path / "none", metrics="f1")
    with pytest.raises(SettingsError, match="'pearson' needs labels that are numbers .*, but .* has classes. Pass one"):
        evaluate([adapter], tmp_path / "train.jsonl", out=tmp_path / "none", metrics="pearson")


def test_numbers_to_predict(base: str, tmp_path: Path) -> None:
    numbers = [row | {"label": (n % 5) * 1.25} for n, row in enumerate(ROWS)]
    data = write(tmp_path / "train.jsonl", numbers)
    adapter = train(base, data, tmp_path / "adapter")
    assert AutoConfig.from_pretrained(adapter).problem_type == "regression"
    found = logits(stock(base, adapter), numbers)
    assert found.shape == (12, 1)
    result = evaluate([adapter], data, out=tmp_path / "run", metrics="loss,pearson,spearman")
    labels = torch.tensor([row["label"] for row in numbers])
    predicted = found[:, 0]
    expected = [
        torch.nn.functional.mse_loss(predicted, labels).item(),
        stats.pearsonr(predicted, labels).statistic,
        stats.spearmanr(predicted, labels).statistic,
    ]
    assert [one.value for one in result.results] == pytest.approx(expected, abs=1e-4)
    healed = shrink(
        adapter, data, out=tmp_path / "shrunk", params_fraction=0.3, score_examples=4, heal=write(
            tmp_path / "heal.jsonl", [{"sentence1": f"other {n}", "sentence2": "x", "label": 1.5} for n in range(8)]
        ), heal_steps=2,
    )  # fmt: skip
    assert healed.metric == "loss" and healed.pruned is not None
    whole = [row | {"label": 1 + n % 3} for n, row in enumerate(ROWS)]
    with pytest.raises(DataError, match="a class, but the head of .* has one output, .*Pass --labels numbers"):
        evaluate([adapter], write(tmp_path / "whole.jsonl", whole), out=tmp_path / "none")
    reading = DataSettings(labels="numbers")
    assert evaluate([adapter], tmp_path / "whole.jsonl", out=tmp_path / "asked", reading=reading).results[0].value > 0
    with pytest.raises(SettingsError, match="'accuracy' needs labels that are classes, but .* has numbers to predict"):
        evaluate([adapter], data, out=tmp_path / "none", metrics="accuracy")
