"""Teacher forcing of encoder-decoders against the losses that transformers' own models compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForSeq2SeqLM, PreTrainedTokenizerBase, set_seed

from lorazor.adapter.load import load
from lorazor.adapter.parts import Parts
from lorazor.data.batches import make_batches, make_prompt_batches
from lorazor.data.examples import Example
from lorazor.errors import BaseModelError
from lorazor.measure.generation import generate_batch
from lorazor.measure.losses import row_losses
from tests.adapter.test_classifiers import BART, GEMMA, SIZES, T5
from tests.data.test_batches import byte_tokenizer
from tests.tiny_models import randomise_b_

T5GEMMA = {"encoder": GEMMA, "decoder": {**GEMMA, "bos_token_id": 3, "cross_attention_hidden_size": 16}}
# family: sizes, modules to adapt, what its generation_config says
FAMILIES: dict[str, tuple[dict[str, Any], list[str], int | None]] = {
    "t5": (T5, ["q", "v"], 0),
    "longt5": (T5, ["q", "v"], 0),
    "t5gemma": (T5GEMMA, ["q_proj", "v_proj"], None),
    "mbart": (BART, ["q_proj", "v_proj"], None),
    "plbart": (BART, ["q_proj", "v_proj"], None),
    "bart": ({**BART, "decoder_start_token_id": 4}, ["q_proj", "v_proj"], None),
    "m2m_100": ({**BART, "decoder_start_token_id": 4}, ["q_proj", "v_proj"], None),
}
FAST = ("t5", "mbart", "m2m_100")
EACH_FAMILY = [one if one in FAST else pytest.param(one, marks=pytest.mark.slow) for one in FAMILIES]
EXAMPLES = [Example(n, f"number {n}", "abcdefg"[n:], ("abcdefg"[n:],)) for n in (0, 5, 3)]


def make_folders(root: Path, family: str, tokenizer: PreTrainedTokenizerBase, start: int | None) -> Path:
    """A base model whose generation_config alone may name the token that the decoder starts with; an adapter on it."""
    sizes, targets, _ = FAMILIES[family]
    set_seed(0)
    model: Any = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(family, **{**SIZES, "dropout": 0.0, **sizes}))
    if start is not None:
        model.generation_config.decoder_start_token_id = start
    model.save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    base = AutoModelForSeq2SeqLM.from_pretrained(root / "base")
    peft_model = get_peft_model(base, LoraConfig(target_modules=targets, task_type="SEQ_2_SEQ_LM"))
    randomise_b_(peft_model)
    peft_model.save_pretrained(root / "adapter")
    return root / "adapter"


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_losses_are_those_of_the_models_own_labels(family, tmp_path):
    start = FAMILIES[family][2]
    loaded = load(make_folders(tmp_path, family, byte_tokenizer(None), start))
    (batch,) = make_batches(EXAMPLES, loaded.tokenizer, "seq2seq", 3, None, loaded.decoder_inputs).batches
    found = row_losses(loaded.model, batch).nll_nats
    config: Any = loaded.model.config
    for example, nll in zip(batch.indices, found.tolist(), strict=True):
        text = next(one for one in EXAMPLES if one.index == example)
        ids = torch.tensor([loaded.tokenizer(text.prompt).input_ids])
        answer = torch.tensor([[*loaded.tokenizer(text.completion).input_ids, 2]])
        with torch.no_grad():
            own = loaded.model(input_ids=ids, labels=answer).loss.item() * answer.numel()
        assert nll == pytest.approx(own, abs=1e-3)
    if start is not None:
        assert config.decoder_start_token_id == start


def test_answers_start_with_what_teacher_forcing_starts_with(tmp_path):
    """The decoder of mBART starts with the language, which its tokenizer writes at the end of an answer."""
    tokenizer = byte_tokenizer(None, "$A <eos> <bos>")  # the language is <bos>
    loaded = load(make_folders(tmp_path, "mbart", tokenizer, None))
    (batch,) = make_batches(EXAMPLES, loaded.tokenizer, "seq2seq", 3, None, loaded.decoder_inputs).batches
    assert batch.targets[0].tolist()[-2:] == [2, 1]
    assert batch.inputs["decoder_input_ids"][:, 0].tolist() == [1, 1, 1]
    (prompts,) = make_prompt_batches(EXAMPLES[:1], loaded.tokenizer, "seq2seq").batches
    parts = Parts(tuple(loaded.sites))
    (prediction,) = generate_batch(loaded, parts, prompts, torch.ones(1, len(parts)), 1)
    with torch.no_grad():
        logits = loaded.model(**prompts.inputs, decoder_input_ids=torch.tensor([[1]])).logits
    assert prediction.text == loaded.tokenizer.decode(logits[0].argmax(-1), skip_special_tokens=True)


def test_a_decoder_that_starts_with_nothing_is_refused(tmp_path):
    with pytest.raises(
        BaseModelError, match=r"base' does not say which token its decoder begins with .*Set decoder_st"
    ):
        load(make_folders(tmp_path, "t5", byte_tokenizer(None), None))
