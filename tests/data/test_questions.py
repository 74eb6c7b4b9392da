"""Questions are read strictly, their windows hold the right tokens, and the best answer is the best of all."""

from __future__ import annotations

import gzip
import json
import lzma
from itertools import product
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from lorazor.data.questions import Question, Window, best_answers, encode_questions, pad_windows, read_questions
from lorazor.errors import DataError, SettingsError
from tests.data.test_batches import byte_tokenizer

CONTEXT = "Jörg 🙂 wohnt in Köln,\nseit 1999."
ROWS = [
    {"question": " Wer?", "context": CONTEXT, "answers": {"text": ["Jörg", "Jörg 🙂"], "answer_start": [0, 0]}},
    {"question": "Wo?", "context": CONTEXT, "answers": {"text": ["Köln"], "answer_start": [16]}},
    {"question": "Warum?", "context": CONTEXT, "answers": {"text": [], "answer_start": []}},
]
QUESTIONS = [
    Question(0, "Wer?", CONTEXT, ("Jörg", "Jörg 🙂"), (0, 0)),
    Question(1, "Wo?", CONTEXT, ("Köln",), (16,)),
    Question(2, "Warum?", CONTEXT),
]
WORDS = [f"w{number}" for number in range(40)]


def bert_tokenizer(**names: Any) -> PreTrainedTokenizerFast:
    """[CLS] question [SEP] context [SEP] in words: w0 to w39 and a few more, in lower case and without accents."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS, "who", "where", "?", ".", "elan"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}, "[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=inputs, **{**special, **names})


TOKENIZER = bert_tokenizer()
BOTH = pytest.mark.parametrize("tokenizer", [byte_tokenizer(None), TOKENIZER], ids=["bytes", "words"])


def in_words(first: int, last: int, n_words: int = 40, index: int = 0, text: str = "who ?") -> Question:
    """A question whose context is w0 w1 w2 ... and whose answer is the words from `first` to `last`."""
    context = " ".join(WORDS[:n_words])
    answer = " ".join(WORDS[first : last + 1])
    return Question(index, text, context, (answer,), (len(" ".join(["", *WORDS[:first]])),))


def jsonl_bytes(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


# Reading


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.xz", "rows.jsonl.gz"])
def test_json_lines(name: str, tmp_path: Path) -> None:
    compress = {".xz": lzma.compress, ".gz": gzip.compress}.get(Path(name).suffix, bytes)
    (tmp_path / name).write_bytes(compress(jsonl_bytes(*ROWS)))
    assert read_questions(tmp_path / name) == QUESTIONS
    assert read_questions(str(tmp_path / name), limit=2) == QUESTIONS[:2]
    assert [question.references for question in QUESTIONS] == [("Jörg", "Jörg 🙂"), ("Köln",), ("",)]


def test_parquet_and_folders_saved_by_datasets(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    assert read_questions(tmp_path / "rows.parquet") == QUESTIONS
    parts = {"train": datasets.Dataset.from_list(ROWS[:1]), "validation": datasets.Dataset.from_list(ROWS)}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    assert read_questions(tmp_path / "saved", split="validation", limit=2) == QUESTIONS[:2]
    with pytest.raises(DataError, match="one of its splits: 'train', 'validation'"):
        read_questions(tmp_path / "saved")


def answers(*pairs: tuple[Any, Any]) -> dict[str, Any]:
    return {**ROWS[0], "answers": {"text": [text for text, _ in pairs], "answer_start": [start for _, start in pairs]}}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1], "line 2.*no object with columns"),
        ({"question": "?", "answers": {}}, "line 2: no column 'context'; the columns are 'question', 'answers'"),
        ({"question": "?", "context": "c"}, "no column 'answers'.*Questions need question, context, answers"),
        ({**ROWS[0], "question": 3}, "line 2: column 'question' must be text.*not a number"),
        ({**ROWS[0], "context": None}, "column 'context' must be text.*not null"),
        ({**ROWS[0], "context": "half \ud83d"}, "column 'context' has half of a surrogate pair"),
        ({**ROWS[0], "context": " \n"}, "column 'context' holds no text"),
        ({**ROWS[0], "answers": "Jörg"}, "column 'answers' is 'Jörg', but must be .*answer_start"),
        ({**ROWS[0], "answers": None}, "column 'answers' is None, but must be"),
        ({**ROWS[0], "answers": {"text": ["Jörg"], "answer_start": []}}, "one entry per answer"),
        (answers((7, 0)), "each of 'text' must be text"),
        (answers((" ", 4)), "an empty answer. Where there is no answer, leave both lists empty"),
        (answers(("Jörg", True)), "'answer_start' holds True. Pass whole numbers"),
        (answers(("Jörg", 0.0)), "'answer_start' holds 0.0"),
        (answers(("Jörg", 0), ("Köln", 19)), "answer_start=19 is at 'n,..s', but 'Köln' is at 16"),  # bytes
        (answers(("1999.", -5)), "answer_start=-5 is at 'Jörg ', but '1999.' is at 27"),  # Python would find it
        (answers(("Bonn", 16)), "answer_start=16 is at 'Köln', but 'Bonn' is nowhere in the context"),
    ],
)
def test_rows_that_cannot_be_used(row: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(jsonl_bytes(ROWS[0], row))
    with pytest.raises(DataError, match=message):
        read_questions(tmp_path / "rows.jsonl")


def test_sources_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b"\n")
    with pytest.raises(DataError, match="is empty"):
        read_questions(tmp_path / "rows.jsonl")
    with pytest.raises(SettingsError, match="limit=0"):
        read_questions(tmp_path / "rows.jsonl", limit=0)
    with pytest.raises(DataError, match="No such file"):
        read_questions(tmp_path / "other.jsonl")


# Windows


def test_a_window_written_by_hand() -> None:
    (window,) = encode_questions([in_words(1, 2, n_words=4, index=7)], TOKENIZER)
    ids = [2, 44, 46, 3, 4, 5, 6, 7, 3]  # [CLS] who ? [SEP] w0 w1 w2 w3 [SEP]
    inputs = {"input_ids": ids, "token_type_ids": [0] * 4 + [1] * 5, "attention_mask": [1] * 9}
    assert window.features == inputs | {"start_positions": 5, "end_positions": 6}
    assert (window.index, window.no_answer_position, window.context_start) == (7, 0, 4)
    assert window.offsets.tolist() == [[0, 2], [3, 5], [6, 8], [9, 11]]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_windows_slide_over_the_context(data: st.DataObject) -> None:
    n_words = data.draw(st.integers(1, 40))
    first = data.draw(st.integers(0, n_words - 1))
    last = data.draw(st.integers(first, min(first + 8, n_words - 1)))
    room, stride = data.draw(st.integers(1, 45)), data.draw(st.integers(0, 20))
    question = in_words(first, last, n_words)
    windows = encode_questions([question], TOKENIZER, max_length=room + 5, stride=stride)  # [CLS] who ? [SEP], [SEP]
    step = room - min(stride, room // 2)
    begins = [0]
    while begins[-1] + room < n_words:
        begins.append(begins[-1] + step)
    assert len(windows) == len(begins)
    for window, begin in zip(windows, begins, strict=True):
        end = min(begin + room, n_words)
        assert window.inputs["input_ids"].tolist() == [2, 44, 46, 3, *range(4 + begin, 4 + end), 3]
        assert [question.context[a:b] for a, b in window.offsets] == WORDS[begin:end]
        expected = (4 + first - begin, 4 + last - begin) if begin <= first and last < end else (0, 0)
        assert (window.start_position, window.end_position) == expected


def test_only_the_first_answer_counts_and_one_that_every_window_cuts_is_in_none() -> None:
    (window,) = encode_questions([Question(0, "who ?", "w0 w1 w2", ("w2", "w0"), (6, 0))], TOKENIZER)
    assert (window.start_position, window.end_position) == (6, 6)
    cut = encode_questions([in_words(9, 10, n_words=20)], TOKENIZER, max_length=15, stride=0)
    assert [window.features["start_positions"] for window in cut] == [0, 0]
    shared = encode_questions([in_words(9, 10, n_words=20)], TOKENIZER, max_length=15, stride=2)
    assert [window.features["end_positions"] for window in shared] == [0, 6, 0]


def test_without_cls_the_first_token_stands_for_no_answer_and_a_last_cls_is_found() -> None:
    none = Question(0, "who?", "w0 w1")
    (first,) = encode_questions([none], byte_tokenizer(None))
    assert first.no_answer_position == first.start_position == first.end_position == 0
    last_cls = bert_tokenizer()
    last_cls.backend_tokenizer.post_processor = processors.TemplateProcessing(
        pair="$A [SEP] $B [SEP] [CLS]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    (window,) = encode_questions([none], last_cls)
    assert window.inputs["input_ids"].tolist() == [44, 46, 3, 4, 5, 3, 2]
    assert (window.start_position, window.end_position, window.no_answer_position) == (6, 6, 6)


@BOTH
@pytest.mark.parametrize("answer", ["Élan", "🙂", "e\u0301lan", "日本語", "🙂\u200b e\u0301lan", " w1 "])
@pytest.mark.parametrize("room", [10, 100])
def test_the_target_covers_the_characters_of_the_answer(tokenizer: Any, answer: str, room: int) -> None:
    context = "w0 日本語 Élan 🙂\u200b e\u0301lan. w1 w2"
    question = Question(0, "w?", context, (answer,), (context.index(answer),))
    n_question = len(tokenizer("w?", add_special_tokens=False)["input_ids"])
    n_special = tokenizer.num_special_tokens_to_add(pair=True)
    windows = encode_questions([question], tokenizer, max_length=n_question + n_special + room, stride=5)
    found = [window for window in windows if window.start_position != window.no_answer_position]
    assert found or (room == 10 and len(answer) > 4)
    for window in found:
        begin, _ = window.offsets[window.start_position - window.context_start].tolist()
        _, end = window.offsets[window.end_position - window.context_start].tolist()
        # BertPreTokenizer makes a word of each ideograph, and ByteLevel leaves the space with the word
        assert context[begin:end].strip() == answer.strip()


@pytest.mark.parametrize("has_settings", [False, True])
def test_the_tokenizer_is_not_changed(has_settings: bool) -> None:
    tokenizer = bert_tokenizer()
    if has_settings:
        tokenizer.backend_tokenizer.enable_truncation(max_length=9, stride=1, strategy="longest_first")
    before = tokenizer.backend_tokenizer.to_str()
    encode_questions([in_words(0, 1)], tokenizer, max_length=20)
    assert tokenizer.backend_tokenizer.to_str() == before
    with pytest.raises(DataError):
        encode_questions([Question(0, "who ?", "w0 \u200b", ("\u200b",), (3,))], tokenizer)
    assert tokenizer.backend_tokenizer.to_str() == before


def test_the_limit_is_the_tokenizers_if_it_has_one() -> None:
    (window,) = encode_questions([in_words(38, 39)], TOKENIZER)
    assert len(window.offsets) == 40
    (short, *_) = encode_questions([in_words(38, 39)], bert_tokenizer(model_max_length=25))
    assert len(short.inputs["input_ids"]) == 25


def test_padding_is_on_the_right_whatever_the_tokenizer_prefers() -> None:
    tokenizer = bert_tokenizer(padding_side="left")
    windows = encode_questions([in_words(0, 0, n_words=3), in_words(0, 0, n_words=1, index=1)], tokenizer)
    batch = {name: array.tolist() for name, array in pad_windows(windows, tokenizer).items()}
    assert batch == {
        "input_ids": [[2, 44, 46, 3, 4, 5, 6, 3], [2, 44, 46, 3, 4, 3, 0, 0]],
        "token_type_ids": [[0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1, 0, 0]],
        "attention_mask": [[1] * 8, [1] * 6 + [0] * 2],
    }
    with pytest.raises(DataError, match="no pad token"):
        pad_windows(windows, bert_tokenizer(pad_token=None))


@pytest.mark.parametrize(
    ("questions", "options", "error", "message"),
    [
        ([], {}, DataError, "There are no questions"),
        ([in_words(0, 0)], {"max_length": 0}, SettingsError, "max_length=0"),
        ([in_words(0, 0)], {"stride": -1}, SettingsError, "stride=-1"),
        ([in_words(0, 0, index=3)], {"max_length": 5}, DataError, "Question 3 has 2 tokens, but max_length=5.*for 1 "),
        ([in_words(0, 0)], {"max_length": 2}, DataError, "has 2 tokens, but max_length=2 has room for 0 "),
        ([Question(4, "?", "w0 \u200b", ("\u200b",), (3,))], {}, DataError, "Question 4: the tokenizer has no token"),
    ],
)
def test_what_cannot_be_encoded(
    questions: list[Question], options: dict[str, int], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        encode_questions(questions, TOKENIZER, **options)


def test_slow_tokenizers_are_refused() -> None:
    with pytest.raises(SettingsError, match="ByT5Tokenizer is a slow tokenizer"):
        encode_questions([in_words(0, 0)], ByT5Tokenizer())


# Answers


def random_logits(windows: list[Window], seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Starts and ends of every window, with three high numbers of padding behind them."""
    generator = np.random.default_rng(seed)
    lengths = [len(window.inputs["input_ids"]) for window in windows]
    starts, ends = ([generator.normal(size=length + 3) for length in lengths] for _ in range(2))
    for logits, length in zip([*starts, *ends], lengths * 2, strict=True):
        logits[length:] = 100
    return starts, ends


def best_by_hand(question: Question, scored: list[tuple[Window, Any, Any]], most: int) -> tuple[float, str, float]:
    """The best score and text, and the score of no answer: every pair of tokens of every window, one by one."""
    candidates, none = [], []
    for window, start, end in scored:
        if window.index != question.index:
            continue
        none.append(start[window.no_answer_position] + end[window.no_answer_position])
        pieces = window.offsets.tolist()
        for i, j in product(range(len(pieces)), repeat=2):
            is_blank = any(question.context[slice(*pieces[place])].isspace() for place in (i, j))
            if i <= j < i + most and not is_blank:
                score = start[window.context_start + i] + end[window.context_start + j]
                candidates.append((score, question.context[pieces[i][0] : pieces[j][1]].strip()))
    return *max(candidates), min(none)


@BOTH
@pytest.mark.parametrize("most", [1, 3, 30])
@pytest.mark.parametrize("seed", range(4))
def test_the_best_answer_is_the_best_of_all_pairs(tokenizer: Any, most: int, seed: int) -> None:
    long = "w0 Jörg\n\n\n 🙂 w1, w2 w3 w4 w5 w6 w7 w8.\n w9 w10 w11 w12"
    questions = [Question(5, "who?", long), Question(2, "where?", "w1 \n w2."), in_words(0, 1, index=9)]
    windows = encode_questions(questions, tokenizer, max_length=24, stride=4)
    assert len(windows) > 4  # of three questions
    starts, ends = random_logits(windows, seed)
    by_hand = [best_by_hand(question, list(zip(windows, starts, ends, strict=True)), most) for question in questions]
    assert best_answers(questions, windows, starts, ends, most) == [text for _, text, _ in by_hand]
    for threshold in (-1.5, 0.0, 1.5):
        expected = ["" if none - score > threshold else text for score, text, none in by_hand]
        assert best_answers(questions, windows, starts, ends, most, threshold) == expected


def test_an_answer_needs_more_than_the_least_no_answer_of_all_windows() -> None:
    question = in_words(0, 0, n_words=4)
    windows = encode_questions([question], TOKENIZER, max_length=7, stride=0)  # [CLS] who ? [SEP] two words [SEP]
    assert len(windows) == 2

    def answer(none: tuple[float, float], threshold: float | None = 0.0) -> str:
        starts, ends = np.zeros((2, 7)), np.zeros((2, 7))
        starts[:, 0] = none
        starts[1, 4], ends[1, 5] = 1.0, 2.0  # "w2 w3" scores 3
        (text,) = best_answers([question], windows, list(starts), list(ends), threshold=threshold)
        return text

    assert answer((9, 2.9)) == answer((2.9, 9)) == "w2 w3"  # the other window alone would say no answer
    assert answer((9, 3.0)) == "w2 w3"  # as good: answer
    assert answer((9, 3.1)) == ""
    assert answer((9, 3.1), threshold=0.2) == "w2 w3"
    assert answer((9, 9), threshold=None) == "w2 w3"


def test_ties_keep_the_shorter_answer_then_the_earlier() -> None:
    question = in_words(0, 0, n_words=4)
    windows = encode_questions([question], TOKENIZER)
    assert best_answers([question], windows, [np.zeros(9)], [np.zeros(9)]) == ["w0"]
    with pytest.raises(SettingsError, match="max_answer_tokens=0"):
        best_answers([question], windows, [np.zeros(9)], [np.zeros(9)], max_answer_tokens=0)


def test_a_window_of_white_space_has_no_answer() -> None:
    question = Question(0, "who?", "\n" * 30 + "w0")
    tokenizer = byte_tokenizer(None)
    windows = encode_questions([question], tokenizer, max_length=14, stride=0)
    starts, ends = random_logits(windows, 0)
    assert best_answers([question], windows[:1], starts[:1], ends[:1]) == [""]
