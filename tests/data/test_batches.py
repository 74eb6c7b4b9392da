"""Batches hold the tokens TRL trains on, judge each answer token once, and count what they cut off."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import datasets
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from lorazor.data.batches import IGNORED, Batch, make_batches, make_prompt_batches
from lorazor.data.examples import Example
from lorazor.errors import DataError, SettingsError
from tests.tiny_models import starting_with

SPECIAL = ["<pad>", "<bos>", "<eos>", "<|", "|>"]
CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Starts with the beginning-of-sequence token, refuses a system message, and opens a turn with a thought that the
# finished conversation does not have.
THINKING = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<|{{ m['role'] }}|>{{ m['content'] }}<eos>{% endfor %}{% if add_generation_prompt %}<|assistant|>(hm) {% endif %}"
)


def byte_tokenizer(template: str | None = CHATML, frame: str | None = None, **settings: Any) -> PreTrainedTokenizerFast:
    """Bytes as tokens, but " a" to " z" and "th" merged; `frame` such as "<bos> $A" adds special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", letter) for letter in "abcdefghijklmnopqrstuvwxyz"] + [("t", "h")]
    vocabulary = [*SPECIAL, *alphabet, *("".join(pair) for pair in merges)]
    tokens = {token: index for index, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.BPE(tokens, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if frame:
        ids = [(token, tokens[token]) for token in ("<bos>", "<eos>")]
        tokenizer.post_processor = processors.TemplateProcessing(single=frame, special_tokens=ids)
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "extra_special_tokens": SPECIAL[3:]}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **{**names, **settings})


def text(index: int, prompt: str, completion: str) -> Example:
    return Example(index, prompt, completion, (completion,))


def chat(index: int, *contents: str) -> Example:
    roles = ("user", "assistant") * len(contents)
    messages = tuple({"role": role, "content": content} for role, content in zip(roles, contents, strict=False))
    return Example(index, messages[:-1], contents[-1], (contents[-1],))


def labelled(index: int, prompt: str, label: int) -> Example:
    return Example(index, prompt, "", (), label)


TEXTS = [
    text(0, "name[The Vaults], food[English]\nDescription:", " The Vaults is a pub."),
    text(1, "the answer is ", "yes"),  # its last space merges with the answer
    text(2, "is it bot", "h?"),
    text(3, "Wie heißt du?", " Jörg 🙂"),
    text(4, "Say stop:", " stop<eos>"),  # ends already
    text(5, "t", "h"),  # the whole prompt merges with the answer
]
CHATS = [chat(0, "2 + 2 =", "4"), chat(1, "Hello", "Hi! What", "is the time?", "Noon."), chat(2, "Wie?", " gut ")]


def causal_rows(examples: Sequence[Example], tokenizer: Any, **settings: Any) -> dict[int, tuple[list[int], list[int]]]:
    """Ids and targets of each example, without padding, which must be on the right and not judged."""
    rows = {}
    for batch in make_batches(examples, tokenizer, "causal", **settings).batches:
        for index, ids, mask, targets in zip(batch.indices, *batch.inputs.values(), batch.targets, strict=True):
            n_tokens = int(mask.sum())
            assert mask.tolist() == [1] * n_tokens + [0] * (len(mask) - n_tokens)
            assert set(targets[n_tokens:].tolist()) <= {IGNORED}
            rows[index] = (ids[:n_tokens].tolist(), targets[:n_tokens].tolist())
    return rows


def prompt_rows(examples: Sequence[Example], tokenizer: Any, **settings: Any) -> dict[int, list[int]]:
    rows = {}
    for batch in make_prompt_batches(examples, tokenizer, "causal", **settings).batches:
        for index, ids, mask in zip(batch.indices, *batch.inputs.values(), strict=True):
            assert mask.tolist() == sorted(mask.tolist())  # padding on the left
            rows[index] = ids[mask.bool()].tolist()
    return rows


# The same tokens as TRL


@pytest.fixture(scope="module")
def tiny_llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=320, **sizes)).eval()


def tokens_of_trl(model: Any, tokenizer: Any, examples: list[Example], folder: str) -> list[tuple[list, list]]:
    """Token ids and labels that TRL's trainer makes of the examples."""
    rows = []
    for example in examples:
        answer = [{"role": "assistant", "content": example.completion}]
        chat_row = {"prompt": list(example.prompt), "completion": answer}
        text_row = {"prompt": example.prompt, "completion": example.completion}
        rows.append(chat_row if example.is_conversational else text_row)
    quiet = {"gradient_checkpointing": None, "activation_checkpointing": False, "report_to": "none"}
    arguments = SFTConfig(folder, max_length=None, use_cpu=True, bf16=False, **quiet)
    trainer = SFTTrainer(model, arguments, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer)
    return [(row["input_ids"], row["labels"]) for row in trainer.train_dataset]


@pytest.mark.parametrize(
    ("examples", "tokenizer"),
    [
        pytest.param(TEXTS[:5], byte_tokenizer(), id="texts"),
        pytest.param(TEXTS, byte_tokenizer(frame="<bos> $A"), id="texts, bos added"),
        pytest.param(TEXTS, byte_tokenizer(frame="<bos> $A <eos>"), id="texts, bos and eos added"),
        pytest.param(CHATS, byte_tokenizer(), id="chats"),
        pytest.param(CHATS, byte_tokenizer(THINKING, frame="<bos> $A"), id="chats, thought in the open turn"),
    ],
)
def test_tokens_and_judged_positions_are_those_of_trl(
    examples: list[Example], tokenizer: Any, tiny_llama: Any, tmp_path: Any
) -> None:
    expected = tokens_of_trl(tiny_llama, copy.deepcopy(tokenizer), examples, str(tmp_path))
    rows = causal_rows(examples, tokenizer, batch_size=2)
    assert sorted(rows) == [example.index for example in examples]
    for index, (ids, labels) in enumerate(expected):
        assert rows[index] == (ids, [*labels[1:], IGNORED])  # the model shifts TRL's labels, ours are shifted
        judged = tokenizer.decode([label for label in labels if label != IGNORED])
        assert "<eos>" in judged and examples[index].completion.strip() in judged


def test_targets_give_the_loss_of_the_model_itself(tiny_llama: Any) -> None:
    tokenizer = byte_tokenizer()
    (batch,) = make_batches(TEXTS[:4], tokenizer, "causal").batches
    logits = tiny_llama(**batch.inputs).logits
    ours = cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED)
    labels = torch.full_like(batch.targets, IGNORED)
    labels[:, 1:] = batch.targets[:, :-1]
    theirs = tiny_llama(**batch.inputs, labels=labels).loss
    torch.testing.assert_close(ours, theirs)


# Prompts to generate from


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), byte_tokenizer(THINKING, frame="<bos> $A <eos>")])
@pytest.mark.parametrize("examples", [TEXTS[:5], CHATS])
def test_prompts_are_what_comes_before_the_answer(examples: list[Example], tokenizer: Any) -> None:
    teacher_forced = causal_rows(examples, tokenizer)
    prompts = prompt_rows(examples, tokenizer, batch_size=3, max_new_tokens=9)
    assert sorted(prompts) == [example.index for example in examples]
    for index, (ids, targets) in teacher_forced.items():
        n_prompt = next(place for place, target in enumerate(targets) if target != IGNORED) + 1
        assert prompts[index] == ids[:n_prompt]


def test_prompts_leave_room_for_new_tokens() -> None:
    tokenizer = byte_tokenizer()
    (example,) = examples = [text(0, "12345678", "9")]
    assert prompt_rows(examples, tokenizer, max_length=10, max_new_tokens=2) == {0: tokenizer(example.prompt).input_ids}
    assert prompt_rows(examples, tokenizer, max_length=10, max_new_tokens=7) == {0: tokenizer("678").input_ids}
    assert make_prompt_batches(examples, tokenizer, "causal", max_length=10, max_new_tokens=7).n_truncated == 1
    with pytest.raises(SettingsError, match="max_new_tokens=10 leaves no room .*max_length=10. Pass 0..9"):
        make_prompt_batches(examples, tokenizer, "causal", max_length=10, max_new_tokens=10)


# Order and padding


@pytest.mark.parametrize("batch_size", [1, 2, 4, 100])
def test_every_example_once_with_similar_lengths_together(batch_size: int) -> None:
    lengths = [5, 1, 9, 1, 7, 3, 3]
    examples = [text(10 + index, "p" * n, "a") for index, n in enumerate(lengths)]
    batches = make_batches(examples, byte_tokenizer(), "causal", batch_size=batch_size).batches
    by_length = [12, 14, 10, 15, 16, 11, 13]  # longest first, equal ones in their order
    expected = [tuple(by_length[start : start + batch_size]) for start in range(0, 7, batch_size)]
    assert [batch.indices for batch in batches] == expected
    for batch in batches:
        longest = max(lengths[index - 10] for index in batch.indices) + 2  # an answer of one token, and the end
        shape = (len(batch.indices), longest)
        assert [tuple(tensor.shape) for tensor in (*batch.inputs.values(), batch.targets)] == [shape] * 3
        assert {tensor.dtype for tensor in (*batch.inputs.values(), batch.targets)} == {torch.int64}


@pytest.mark.parametrize(("pad_token", "padding"), [("<pad>", 0), (None, 2)])
def test_eos_pads_where_there_is_no_pad_token(pad_token: str | None, padding: int) -> None:
    tokenizer = byte_tokenizer(pad_token=pad_token)
    examples = [text(0, "pppp", "a"), text(1, "p", "a")]
    (batch,) = make_batches(examples, tokenizer, "causal").batches
    (prompts,) = make_prompt_batches(examples, tokenizer, "causal").batches
    assert batch.inputs["input_ids"][1, 3:].tolist() == [padding] * 3
    assert prompts.inputs["input_ids"][1, :3].tolist() == [padding] * 3
    assert tokenizer.pad_token == pad_token


# Truncation


def decoded(tokenizer: Any, rows: dict[int, tuple[list[int], list[int]]]) -> list[tuple[str, str]]:
    """The text the model reads, and the text it is judged on."""
    judged = [[target for target in targets if target != IGNORED] for _, targets in rows.values()]
    return [(tokenizer.decode(ids), tokenizer.decode(own)) for (ids, _), own in zip(rows.values(), judged, strict=True)]


def test_prompts_lose_tokens_on_the_left_and_are_counted() -> None:
    tokenizer = byte_tokenizer()
    examples = [text(0, "0123456789", "abc"), text(1, "01", "abc"), text(2, "0123", "a")]
    expected = [("89abc<eos>", "abc<eos>"), ("01abc<eos>", "abc<eos>"), ("0123a<eos>", "a<eos>")]
    assert decoded(tokenizer, causal_rows(examples, tokenizer, max_length=6)) == expected
    assert make_batches(examples, tokenizer, "causal", max_length=6).n_truncated == 1
    assert make_batches(examples, tokenizer, "causal", max_length=14).n_truncated == 0


def test_the_limit_of_the_tokenizer_holds_unless_another_is_given() -> None:
    examples = [text(0, "0123456789", "abc")]
    limited = byte_tokenizer(model_max_length=7)
    assert decoded(limited, causal_rows(examples, limited)) == [("789abc<eos>", "abc<eos>")]
    assert make_batches(examples, limited, "causal", max_length=14).n_truncated == 0
    assert make_batches(examples, byte_tokenizer(), "causal").n_truncated == 0


def test_the_beginning_of_the_sequence_is_not_cut_off() -> None:
    tokenizer = byte_tokenizer(frame="<bos> $A")
    for limit, prompt in ((7, "<bos>89"), (6, "<bos>9"), (5, "<bos>")):
        rows = causal_rows([text(0, "0123456789", "abc")], tokenizer, max_length=limit)
        assert decoded(tokenizer, rows) == [(prompt + "abc<eos>", "abc<eos>")]


@pytest.mark.parametrize("task", ["causal", "seq2seq"])
def test_an_answer_that_does_not_fit_is_refused(task: Any) -> None:
    examples = [text(0, "0", "a"), text(7, "0", "abcde")]
    for limit in (3, 5):
        room = limit - 1 if task == "causal" else limit
        with pytest.raises(DataError, match=f"Example 7: its answer has 6 tokens.*={limit} has room for {room}"):
            make_batches(examples, byte_tokenizer(), task, max_length=limit, decoder_inputs=starting_with(0))
    make_batches(examples, byte_tokenizer(), task, max_length=7, decoder_inputs=starting_with(0))


def test_the_first_token_of_a_bare_answer_cannot_be_judged() -> None:
    tokenizer = byte_tokenizer()
    assert decoded(tokenizer, causal_rows([text(0, "", "abc")], tokenizer)) == [("abc<eos>", "bc<eos>")]
    with pytest.raises(DataError, match="Example 3 has a prompt without tokens"):
        make_prompt_batches([text(3, "", "abc")], tokenizer, "causal")


# Encoder-decoder models and classification


def seq2seq_rows(batch: Batch) -> list[tuple[list[int], list[int], list[int]]]:
    """(source, decoder inputs, targets) of each row, without padding."""
    rows = []
    for ids, mask, start, targets in zip(*batch.inputs.values(), batch.targets, strict=True):
        n_answer = int((targets != IGNORED).sum())
        rows.append((ids[mask.bool()].tolist(), start[:n_answer].tolist(), targets[:n_answer].tolist()))
    return rows


@pytest.mark.parametrize("frame", ["<bos> $A <eos>", "$A <eos>", None])
def test_seq2seq_reads_the_prompt_and_predicts_the_answer(frame: str | None) -> None:
    tokenizer = byte_tokenizer(frame=frame)
    examples = [text(0, "question", "yes"), text(1, "other question", "no")]
    (batch,) = make_batches(examples, tokenizer, "seq2seq", decoder_inputs=starting_with(3)).batches
    assert batch.indices == (1, 0)
    bos = [1] if frame and "<bos>" in frame else []
    for row, example in zip(seq2seq_rows(batch), reversed(examples), strict=True):
        answer = [*bos, *tokenizer(example.completion, add_special_tokens=False).input_ids, 2]
        assert row == (tokenizer(example.prompt).input_ids, [3, *answer[:-1]], answer)
    assert batch.inputs["input_ids"][1, -1] == 0  # padded on the right
    (prompts,) = make_prompt_batches(examples, tokenizer, "seq2seq").batches
    assert all(tensor.equal(batch.inputs[name]) for name, tensor in prompts.inputs.items())


@pytest.mark.parametrize(("limit", "source"), [(6, "<bos>6789<eos>"), (12, "<bos>0123456789<eos>")])
def test_seq2seq_sources_are_cut_inside_their_frame(limit: int, source: str) -> None:
    tokenizer = byte_tokenizer(frame="<bos> $A <eos>")
    examples = [text(0, "0123456789", "a"), text(1, "0", "a")]
    encoding = make_batches(examples, tokenizer, "seq2seq", max_length=limit, decoder_inputs=starting_with(0))
    prompts = make_prompt_batches(examples, tokenizer, "seq2seq", max_length=limit)
    assert tokenizer.decode(seq2seq_rows(encoding.batches[0])[0][0]) == source
    assert tokenizer.decode(prompts.batches[0].inputs["input_ids"][0]) == source
    assert encoding.n_truncated == prompts.n_truncated == (limit < 12)


def test_classification_has_a_class_per_text_cut_on_the_right() -> None:
    tokenizer = byte_tokenizer(frame="<bos> $A <eos>")
    examples = [labelled(0, "good", 1), labelled(1, "0123456789", 0), labelled(2, "", 4)]
    encoding = make_batches(examples, tokenizer, "classification", max_length=6, batch_size=2)
    found = {}
    for batch in encoding.batches:
        for index, ids, mask, target in zip(batch.indices, *batch.inputs.values(), batch.targets, strict=True):
            found[index] = (tokenizer.decode(ids[mask.bool()]), target.item())
    assert found == {0: ("<bos>good<eos>", 1), 1: ("<bos>0123<eos>", 0), 2: ("<bos><eos>", 4)}
    assert encoding.n_truncated == 1
    with pytest.raises(SettingsError, match="max_length=2 leaves no room for text. Pass 3 or more"):
        make_batches(examples, tokenizer, "classification", max_length=2)


# Bad input

GOOD = text(5, "a", "b")
SYSTEM = Example(6, ({"role": "system", "content": "a"},), "b", ("b",))


@pytest.mark.parametrize(
    ("examples", "task", "tokenizer_settings", "message"),
    [
        ([], "causal", {}, "There are no examples"),
        ([GOOD, labelled(6, "a", 1)], "causal", {}, "Example 6 is a text with a label, but causal"),
        ([GOOD], "classification", {}, "Example 5 is a prompt with an answer, but classification"),
        ([GOOD, chat(6, "a", "b")], "causal", {"template": None}, "Example 6 is a chat, but the tokenizer has no chat"),
        ([chat(6, "a", "b")], "seq2seq", {}, "Example 6 is a chat, but seq2seq models read text"),
        ([GOOD, text(6, "a", "")], "causal", {}, "Example 6 has no answer tokens"),
        ([GOOD, text(6, "a", "")], "seq2seq", {}, "Example 6 has no answer tokens"),
        ([GOOD, text(6, "", "<eos>")], "causal", {}, "Example 6 has no answer tokens"),
        ([chat(6, "a", "b")], "causal", {"template": "{{ messages[0]['content'] }}"}, "Example 6 has no answer tokens"),
        ([GOOD], "causal", {"eos_token": None}, "no eos token to end answers with"),
        ([GOOD], "causal", {"eos_token": None, "pad_token": None}, "neither a pad nor an eos token"),
        ([text(6, "", "b")], "seq2seq", {}, "Example 6 has a text without tokens"),
        ([SYSTEM], "causal", {"template": THINKING}, r"Example 6: the tokenizer's chat template .* \(no system\)"),
    ],
)
def test_bad_examples(examples: list[Example], task: Any, tokenizer_settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make_batches(examples, byte_tokenizer(**tokenizer_settings), task, decoder_inputs=starting_with(0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "seq2seq"}, "seq2seq needs decoder_inputs"),
        ({"task": "masked"}, "task='masked'. Pass one of causal, seq2seq, classification"),
        ({"batch_size": 0}, "batch_size=0 rows"),
        ({"max_length": 0}, "max_length=0 tokens"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        make_batches([GOOD], byte_tokenizer(), **{"task": "causal", **settings})
    with pytest.raises(SettingsError, match="generates no text"):
        make_prompt_batches([labelled(0, "a", 1)], byte_tokenizer(), "classification")
