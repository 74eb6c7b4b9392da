"""Adapters for question answering are measured as stock PEFT would measure them, one window at a time."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForQuestionAnswering, BertConfig, BertForQuestionAnswering, BertModel, set_seed

from lorazor.adapter.folder import read_adapter
from lorazor.adapter.load import Loaded, load
from lorazor.errors import DataError, LorazorError, MeasureError, SettingsError
from lorazor.settings import DataSettings, EvalSettings, ModelSettings
from lorazor.workflow.curves import measure_curves
from lorazor.workflow.evaluate import evaluate
from lorazor.workflow.reading import read_for
from tests.data.test_questions import WORDS, bert_tokenizer
from tests.tiers import fast_first
from tests.tiny_folders import TinyFolders
from tests.tiny_models import randomise_b_

LIMIT = 18  # tokens of a window
METRICS = "loss,exact-match,token-f1"


def row(n_words: int, *spans: tuple[int, int], first: int = 0) -> dict[str, Any]:
    """A question about w0 w1 ... whose answers are the words of the spans, ends included."""
    context = WORDS[first : first + n_words]
    starts = [len(" ".join(["", *context[:begin]])) for begin, _ in spans]
    texts = [" ".join(context[begin : end + 1]) for begin, end in spans]
    return {
        "question": "who ?" if n_words % 2 else "where w3 ?",
        "context": " ".join(context),
        "answers": {"text": texts, "answer_start": starts},
    }


ANSWERABLE = [row(30, (5, 7)), row(5, (0, 0), (0, 1)), row(13, (9, 12), first=20), row(12, (5, 5), first=6)]
ROWS = [*ANSWERABLE[:2], row(3), row(21), *ANSWERABLE[2:]]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny BERT with a head for questions, the same without one, and an adapter with a head of its own."""
    root = tmp_path_factory.mktemp("questions")
    set_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = BertConfig(**sizes, num_hidden_layers=3, initializer_range=0.3, pad_token_id=0)
    BertForQuestionAnswering(config).save_pretrained(root / "base")
    BertModel(config).save_pretrained(root / "headless")
    for name in ("base", "headless"):
        bert_tokenizer(model_max_length=LIMIT).save_pretrained(root / name)
    base = BertForQuestionAnswering.from_pretrained(root / "base")
    lora = LoraConfig(r=2, lora_alpha=8, target_modules=["query", "value"], task_type="QUESTION_ANS")
    peft_model = get_peft_model(base, lora)
    randomise_b_(peft_model.eval())
    head = peft_model.base_model.model.qa_outputs.modules_to_save["default"]
    with torch.no_grad():  # a head that looks at [CLS] as well, so that some answers are empty and some are not
        hidden = peft_model.base_model.model.bert(torch.tensor([[2, 44, 46, 3, 4, 5, 6, 3]]))[0][0]
        head.weight.copy_(0.5 * torch.randn(head.weight.shape) + 0.8 * (hidden[0] - hidden[4:7].mean(0)))
    peft_model.save_pretrained(root / "adapter")
    return {name: root / name for name in ("base", "headless", "adapter")}


def with_bias(folders: dict[str, Path], path: Path, bias: float) -> None:
    """The base model with a head that gives every token the same score."""
    loaded = load(None, ModelSettings(model=str(folders["base"])))
    assert loaded.task == "question-answering"
    torch.nn.init.zeros_(loaded.model.qa_outputs.weight)
    torch.nn.init.constant_(loaded.model.qa_outputs.bias, bias)
    loaded.model.save_pretrained(path)
    loaded.tokenizer.save_pretrained(path)


def by_hand(folders: dict[str, Path], rows: list[dict[str, Any]], may_be_empty: bool) -> tuple[list[float], list[str]]:
    """Loss and answer of each question: stock PEFT, every window by itself and unpadded, every pair of tokens."""
    base = AutoModelForQuestionAnswering.from_pretrained(folders["base"])
    model = PeftModel.from_pretrained(base, folders["adapter"]).eval()
    losses, texts = [], []
    for one in rows:
        question = [{"who": 44, "where": 45, "w3": 7, "?": 46}[word] for word in one["question"].split()]
        words = one["context"].split()
        room = LIMIT - 3 - len(question)
        step = room - room // 2
        begins = [0, *range(step, step * len(words), step)]
        begins = begins[: next(n for n, begin in enumerate(begins) if begin + room >= len(words)) + 1]
        window_losses, none, candidates = [], [], []
        for begin in begins:
            own = words[begin : begin + room]
            ids = [2, *question, 3, *[4 + WORDS.index(word) for word in own], 3]
            kinds = [0] * (len(question) + 2) + [1] * (len(own) + 1)
            answer = one["answers"]["text"][0].split() if one["answers"]["text"] else ["nothing"]
            is_whole = set(answer) <= set(own)
            place = len(question) + 2
            targets = [place + own.index(word) if is_whole else 0 for word in (answer[0], answer[-1])]
            with torch.no_grad():
                output = model(
                    input_ids=torch.tensor([ids]),
                    token_type_ids=torch.tensor([kinds]),
                    start_positions=torch.tensor(targets[:1]),
                    end_positions=torch.tensor(targets[1:]),
                )
            window_losses.append(output.loss.item())  # of transformers: the mean of start and end
            starts, ends = output.start_logits[0], output.end_logits[0]
            none.append((starts[0] + ends[0]).item())
            for i, j in product(range(len(own)), repeat=2):
                if i <= j:
                    candidates.append(((starts[place + i] + ends[place + j]).item(), " ".join(own[i : j + 1])))
        score, text = max(candidates)
        losses.append(sum(window_losses) / len(window_losses))
        texts.append("" if may_be_empty and min(none) > score else text)
    return losses, texts


def f1(text: str, reference: str) -> float:
    """As SQuAD 2.0 defines it, for texts that its normalisation leaves alone."""
    words, wanted = text.split(), reference.split()
    n_common = sum((Counter(words) & Counter(wanted)).values())
    if not words or not wanted:
        return float(words == wanted)
    return 2 * n_common / (len(words) + len(wanted))


@pytest.mark.parametrize("has_unanswerable", [True, False])
@pytest.mark.parametrize("batch_size", fast_first([1, 3, 8], 3))
def test_metrics_are_those_of_stock_peft(folders, tmp_path, has_unanswerable, batch_size) -> None:
    rows = ROWS if has_unanswerable else ANSWERABLE
    data, out = write(tmp_path / "data.jsonl", rows), tmp_path / "run"
    settings = EvalSettings(METRICS, reading=DataSettings(batch_size=batch_size))
    messages: list[str] = []
    results = evaluate([folders["adapter"]], data, out=out, settings=settings, say=messages.append).results
    losses, texts = by_hand(folders, rows, has_unanswerable)
    values = {result.metric: result.value for result in results}
    references = [one["answers"]["text"] or [""] for one in rows]
    pairs = list(zip(texts, references, strict=True))
    assert values["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert values["exact-match"] == pytest.approx(100 * sum(text in right for text, right in pairs) / len(rows))
    best = [max(f1(text, one) for one in right) for text, right in pairs]
    assert values["token-f1"] == pytest.approx(100 * sum(best) / len(rows))
    predictions = {line["example"]: line for line in lines(out / "predictions.jsonl")}
    assert [predictions[index]["text"] for index in range(len(rows))] == texts
    assert predictions[1]["token-f1"] == pytest.approx(100 * best[1], abs=1e-4)
    measured = {line["example"]: line for line in lines(out / "losses.jsonl")}
    assert [measured[n]["nll_nats"] / measured[n]["n_tokens"] for n in measured] == pytest.approx(
        [losses[n] for n in measured], rel=1e-5
    )
    n_long = sum(len(one["context"].split()) + len(one["question"].split()) + 3 > LIMIT for one in rows)
    assert n_long and any(f"{n_long} of {len(rows)} contexts" in message for message in messages)


def test_the_data_decides_whether_there_may_be_no_answer(folders) -> None:
    """Otherwise the test above would not tell the two forms apart."""
    _, with_empty = by_hand(folders, ANSWERABLE, may_be_empty=True)
    _, without = by_hand(folders, ANSWERABLE, may_be_empty=False)
    assert with_empty != without and "" in with_empty and "" not in without


def test_a_head_that_knows_nothing_loses_the_logarithm_of_the_tokens(folders, tmp_path) -> None:
    """Of those of the question alone: padding would add to them."""
    with_bias(folders, tmp_path / "flat", 0.0)
    settings = EvalSettings(model=ModelSettings(model=str(tmp_path / "flat")))
    data = write(tmp_path / "data.jsonl", [row(1, (0, 0)), row(4)])  # [CLS] who ? [SEP] w0 [SEP]: 6 tokens, and 10
    (result,) = evaluate([], data, out=tmp_path / "run", settings=settings).results
    assert result.value == pytest.approx((math.log(6) + math.log(10)) / 2, rel=1e-6)
    rows = lines(tmp_path / "run" / "losses.jsonl")
    # of equals the first is chosen, [CLS]: right where there is no answer
    assert {line["example"]: (line["n_tokens"], line["n_correct"]) for line in rows} == {0: (2, 0), 1: (2, 2)}


@pytest.mark.slow
def test_an_interrupted_run_goes_on(folders, tmp_path) -> None:
    data = write(tmp_path / "data.jsonl", ROWS)
    settings = EvalSettings(METRICS, base=True, reading=DataSettings(batch_size=2))
    whole = evaluate([folders["adapter"]], data, out=tmp_path / "run", settings=settings)
    files = {name: lines(tmp_path / "run" / name) for name in ("losses.jsonl", "predictions.jsonl")}
    assert [len(rows) for rows in files.values()] == [2 * len(ROWS)] * 2
    for name, n_left in (("losses.jsonl", 4), ("predictions.jsonl", 2)):
        text = "".join(json.dumps(one) + "\n" for one in files[name][:n_left])
        (tmp_path / "run" / name).write_text(text + '{"example": 1, "adap')
    resumed = evaluate([folders["adapter"]], data, out=tmp_path / "run", settings=settings, resume=True)
    assert resumed == whole
    for name, rows in files.items():
        again = lines(tmp_path / "run" / name)
        key = lambda one: (one["adapter"], one["example"])  # noqa: E731
        assert list(map(key, again[: len(rows)])) == list(map(key, again))
        assert sorted(map(key, again)) == sorted(map(key, rows))


@pytest.mark.slow
def test_a_base_model_without_a_head_is_said_to_have_none(folders, tmp_path) -> None:
    data, messages = write(tmp_path / "data.jsonl", ROWS), []
    settings = EvalSettings("token-f1", model=ModelSettings(model=str(folders["headless"])))
    evaluate([], data, out=tmp_path / "headless", settings=settings, say=messages.append)
    assert sum("no trained head for questions" in message for message in messages) == 1
    settings = EvalSettings("token-f1", model=ModelSettings(model=str(folders["base"])))
    evaluate([], data, out=tmp_path / "base", settings=settings, say=messages.append)
    assert sum("no trained head for questions" in message for message in messages) == 1


def test_a_loss_that_is_no_number_is_an_error(folders, tmp_path) -> None:
    with_bias(folders, tmp_path / "nan", math.nan)
    settings = EvalSettings("exact-match", model=ModelSettings(model=str(tmp_path / "nan")))
    with pytest.raises(MeasureError, match="loss of example 0 with base is nan"):
        evaluate([], write(tmp_path / "data.jsonl", ROWS), out=tmp_path / "run", settings=settings)


# What does not fit together

PROMPT = {"prompt": "who ?", "completion": "w0"}


@pytest.mark.parametrize(
    ("adapters", "rows", "metrics", "reading", "error", "message"),
    [
        (["qa"], [PROMPT], ["loss"], {}, DataError, "adapter for questions, which needs the columns question, context"),
        (["causal"], ROWS, ["loss"], {}, SettingsError, "an adapter for CAUSAL_LM, but .* has questions"),
        (["causal", "qa"], ROWS, ["loss"], {}, SettingsError, "an adapter for CAUSAL_LM, but .* has questions"),
        (["qa"], ROWS, ["loss", "bleu"], {}, SettingsError, "'bleu' is not one of questions. Pass loss, exact-match"),
        (["qa"], ROWS, ["accuracy"], {}, SettingsError, "'accuracy' is not one of questions"),
        (["qa"], ROWS, ["loss"], {"prompt_column": "context"}, SettingsError, "Name no other column"),
        (["qa"], [ROWS[0] | {"answers": None}], ["loss"], {}, DataError, "line 1: column 'answers' is None"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_model_is_loaded(
    folders, tiny: TinyFolders, tmp_path, monkeypatch, adapters, rows, metrics, reading, error, message
) -> None:
    def never(*args: Any, **kwargs: Any) -> Loaded:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("lorazor.workflow.opening.load", never)
    names = [{"qa": folders["adapter"], "causal": tiny.adapter}[name] for name in adapters]
    settings = EvalSettings(",".join(metrics), reading=DataSettings(**reading))
    with pytest.raises(error, match=message):
        evaluate(names, write(tmp_path / "data.jsonl", rows), out=tmp_path / "run", settings=settings)
    assert not (tmp_path / "run").exists()


def test_questions_that_are_also_prompts_go_to_whom_they_are_for(folders, tiny: TinyFolders, tmp_path) -> None:
    data, plain = write(tmp_path / "both.jsonl", [ROWS[0] | PROMPT]), write(tmp_path / "plain.jsonl", ROWS)
    kinds = {
        name: read_for({"a": read_adapter(path)}, data, DataSettings())
        for name, path in (("qa", folders["adapter"]), ("causal", tiny.adapter))
    }
    assert {name: type(read[0]).__name__ for name, read in kinds.items()} == {"qa": "Question", "causal": "Example"}
    named = DataSettings(prompt_column="question", completion_column="context")
    read = [read_for({}, *one)[0] for one in ((data, DataSettings()), (plain, DataSettings()), (plain, named))]
    assert [type(one).__name__ for one in read] == ["Example", "Question", "Example"]


def test_models_and_examples_of_different_tasks_do_not_fit(folders, tiny: TinyFolders, tmp_path) -> None:
    data, unnamed = write(tmp_path / "questions.jsonl", ROWS), shutil.copytree(folders["adapter"], tmp_path / "adapter")
    config = json.loads((unnamed / "adapter_config.json").read_text())
    (unnamed / "adapter_config.json").write_text(json.dumps(config | {"task_type": None}))
    with pytest.raises(DataError, match="The model answers questions"):
        measure_curves(unnamed, str(tiny.validation), out=tmp_path / "curves")
    settings = EvalSettings(METRICS, reading=DataSettings(max_length=6))
    with pytest.raises(LorazorError, match="Question 0 has 3 tokens, but max_length=6"):
        evaluate([folders["adapter"]], data, out=tmp_path / "eval", settings=settings)
