"""The first loss that a training logs is that of the base model at the answer tokens, computed by hand.

B starts at zero, so whatever the sites, the rank and the learning rate, the first step is taken on the base model.
By hand: tokens put together here, each row by itself (nothing is padded), stock transformers, one log-softmax.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertDecoderConfig,
    ModernBertDecoderForCausalLM,
    PreTrainedTokenizerFast,
    set_seed,
)

from lorazor.settings import (
    BudgetSettings,
    ChoosingSettings,
    ExampleSettings,
    FitSettings,
    LoraSettings,
    ModelSettings,
    TrainSettings,
)
from lorazor.workflow.train import train_adapter
from tests.data.test_batches import byte_tokenizer
from tests.train.test_two_processes import LAUNCHER
from tests.workflow.test_train_tasks import bert, t5

LIMIT = 24  # tokens of a row
# The third one is too long: its prompt loses tokens, its answer none.
TEXTS = [
    ("after 6:", "7"),
    ("say it three times:", "go-go-go"),
    ("count from 1 to 9, and no further:", "123456789"),
    ("yes or no:", "yes"),
]
CHATS = [(f"{prompt[:9]}?", answer[:4]) for prompt, answer in TEXTS]
CLASSES = [("ab", 0), ("bbbbbbb", 2), ("c", 1)]
QUESTIONS = [("who?", "it is Ann.", "Ann", 6), ("where is it then?", "over There", "There", 5)]

Rows = list[dict[str, Any]]
Nats = tuple[float, int]


def llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=320, pad_token_id=0, eos_token_id=2, initializer_range=0.3, **sizes))


def modern_bert_decoder() -> ModernBertDecoderForCausalLM:
    """There is a dense layer between its last hidden state and its output layer."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = ModernBertDecoderConfig(vocab_size=320, pad_token_id=0, eos_token_id=2, initializer_range=0.3, **sizes)
    return ModernBertDecoderForCausalLM(config)


def nats(logits: Tensor, tokens: list[int]) -> float:
    """- sum over positions of log softmax(logits)[token]; logits (positions, vocabulary)."""
    return -sum(float(row.log_softmax(-1)[token]) for row, token in zip(logits, tokens, strict=True))


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def of_prompt_and_answer(model: Any, prompt: list[int], answer: list[int]) -> Nats:
    prompt = prompt[len(prompt) - min(len(prompt), LIMIT - len(answer)) :]
    logits = model(torch.tensor([prompt + answer])).logits[0]
    return nats(logits[len(prompt) - 1 : -1], answer), len(answer)


def of_texts(base: Path, tokenizer: Any) -> list[Nats]:
    model = AutoModelForCausalLM.from_pretrained(base)
    return [of_prompt_and_answer(model, ids_of(tokenizer, p), [*ids_of(tokenizer, a), 2]) for p, a in TEXTS]


def of_chats(base: Path, tokenizer: Any) -> list[Nats]:
    model = AutoModelForCausalLM.from_pretrained(base)
    return [
        of_prompt_and_answer(
            model,
            ids_of(tokenizer, f"<|user|>{prompt}<eos>\n<|assistant|>"),
            ids_of(tokenizer, f"{answer}<eos>\n"),  # as the template ends a turn
        )
        for prompt, answer in CHATS
    ]


def of_seq2seq(base: Path, tokenizer: Any) -> list[Nats]:
    model, found = AutoModelForSeq2SeqLM.from_pretrained(base), []
    for prompt, answer in TEXTS:
        tokens = [*ids_of(tokenizer, answer), 2]
        inputs = torch.tensor([ids_of(tokenizer, prompt)[-LIMIT:]])
        logits = model(input_ids=inputs, decoder_input_ids=torch.tensor([[0, *tokens[:-1]]])).logits[0]
        found.append((nats(logits, tokens), len(tokens)))
    return found


def of_classes(base: Path, tokenizer: Any) -> list[Nats]:
    set_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3).eval()
    return [(nats(model(torch.tensor([ids_of(tokenizer, text)])).logits, [label]), 1) for text, label in CLASSES]


def of_questions(base: Path, tokenizer: Any) -> list[Nats]:
    """No answer begins in the middle of a token here, so that positions can be counted by the text in front."""
    set_seed(0)
    model, found = AutoModelForQuestionAnswering.from_pretrained(base).eval(), []
    for question, context, answer, start in QUESTIONS:
        ids = [*ids_of(tokenizer, question), *ids_of(tokenizer, context)]
        first = len(ids_of(tokenizer, question)) + len(ids_of(tokenizer, context[:start]))
        last = first + len(ids_of(tokenizer, answer)) - 1
        output = model(torch.tensor([ids]))  # no token types: PEFT's wrapper hands none on
        found.append((nats(output.start_logits, [first]) + nats(output.end_logits, [last]), 2))
    return found


TEXT_ROWS: Rows = [{"prompt": prompt, "completion": answer} for prompt, answer in TEXTS]
CHAT_ROWS: Rows = [
    {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}
    for prompt, answer in CHATS
]
CLASS_ROWS: Rows = [{"text": text, "label": label} for text, label in CLASSES]
QUESTION_ROWS: Rows = [
    {"question": question, "context": context, "answers": {"text": [answer], "answer_start": [start]}}
    for question, context, answer, start in QUESTIONS
]
_FAST = [("causal", "lora"), ("seq2seq", "lora"), ("classification", "lora")]
CASES: dict[str, tuple[Callable[[], Any], Rows, str, Callable[[Path, Any], list[Nats]]]] = {
    "causal": (llama, TEXT_ROWS, "q_proj,v_proj", of_texts),
    "causal, LoRA on the output layer": (llama, TEXT_ROWS, "q_proj,lm_head", of_texts),
    "causal, a layer in front of the output layer": (modern_bert_decoder, TEXT_ROWS, "q_proj,v_proj", of_texts),
    "chat": (llama, CHAT_ROWS, "q_proj,v_proj", of_chats),
    "seq2seq": (t5, TEXT_ROWS, "q,v", of_seq2seq),
    "classification": (bert, CLASS_ROWS, "query,value", of_classes),
    "question answering": (bert, QUESTION_ROWS, "query,value", of_questions),
}


def first_loss_by_hand(base: Path, make: Callable[[], Any], by_hand: Callable[[Path, Any], list[Nats]]) -> float:
    """Write a base model and its tokenizer to a folder, and compute the mean over all answer tokens there."""
    set_seed(0)
    make().save_pretrained(base)
    tokenizer = byte_tokenizer()
    tokenizer.padding_side = "left"  # as many have it
    tokenizer.model_input_names = ["input_ids"]  # and some do not ask for a mask
    tokenizer.save_pretrained(base)
    with torch.no_grad():
        rows = by_hand(base, tokenizer)
    return sum(sum_nats for sum_nats, _ in rows) / sum(n_tokens for _, n_tokens in rows)


def write_rows(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train(base: Path, rows: Rows, targets: str, method: str, out: Path, accumulation: int = 1) -> list[dict[str, Any]]:
    data = write_rows(out.with_suffix(".jsonl"), rows)
    settings = TrainSettings(
        model=ModelSettings(str(base)),
        batch_size=len(rows),  # all rows in every step
        reading=ExampleSettings(max_length=LIMIT),
        lora=LoraSettings(rank=2, alpha=4, target_modules=targets),
        fit=FitSettings(steps=2, learning_rate=1e-3, rise_steps=0, accumulation=accumulation),
        method=method,
        budget=BudgetSettings(keep=2 if method == "weightlora" else None),
        choosing=ChoosingSettings(select_steps=1, score="random") if method == "weightlora" else ChoosingSettings(),
    )
    return train_adapter(str(data), out=out, settings=settings).log


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")  # PEFT, of LoRA on the output layer
@pytest.mark.parametrize(
    ("case", "method"),
    [
        pytest.param(case, method, marks=[] if (case, method) in _FAST else pytest.mark.slow)
        for case in CASES
        for method in ("lora", "weightlora")
    ],
)
def test_the_first_loss_is_that_of_the_base_model_at_the_answer_tokens(tmp_path, case, method):
    make, rows, targets, by_hand = CASES[case]
    expected = first_loss_by_hand(tmp_path / "base", make, by_hand)
    first, *_ = train(tmp_path / "base", rows, targets, method, tmp_path / "run")
    assert first["step"] == 1
    assert first["loss"] == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize(
    "case", [case if case == "causal" else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_the_passes_of_a_step_add_up_to_its_loss_and_its_adapter(tmp_path, case):
    """One row a pass, and not the same number of answer tokens in each; the loss by hand, the rest by one pass."""
    make, rows, targets, by_hand = CASES[case]
    expected = first_loss_by_hand(tmp_path / "base", make, by_hand)
    logs = [
        train(tmp_path / "base", rows, targets, "lora", tmp_path / f"in-{n_passes}", n_passes)
        for n_passes in (1, len(rows))
    ]
    assert logs[1][0]["loss"] == pytest.approx(expected, abs=2e-6)
    for one, several in zip(*logs, strict=True):
        assert several["loss"] == pytest.approx(one["loss"], abs=2e-6)
        assert several["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
    whole, shared = (load_file(tmp_path / f"in-{n}" / "adapter_model.safetensors") for n in (1, len(rows)))
    for name, tensor in whole.items():
        if not name.endswith("qa_outputs.bias"):  # a softmax does not see it: Adam makes steps of the rounding
            torch.testing.assert_close(shared[name], tensor, atol=2e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["causal", "seq2seq"])
def test_two_processes_share_the_answer_tokens_of_a_step(tmp_path, case):
    """Each has other rows, and not the same number of answer tokens."""
    make, rows, targets, by_hand = CASES[case]
    expected = first_loss_by_hand(tmp_path / "base", make, by_hand)
    data = write_rows(tmp_path / "data.jsonl", rows)
    command = [sys.executable, *LAUNCHER, "2", "-m", "lorazor", "train", "--model", str(tmp_path / "base")]
    command += ["--data", str(data), "--out", str(tmp_path / "run"), "--target-modules", targets]
    command += ["--batch-size", str(len(rows)), "--max-length", str(LIMIT), "--steps", "1", "--rise-steps", "0"]
    command += ["--accumulation", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command, env=environment, capture_output=True, check=True)
    log = (tmp_path / "run" / "training.jsonl").read_text()
    assert json.loads(log)["loss"] == pytest.approx(expected, abs=2e-6)
