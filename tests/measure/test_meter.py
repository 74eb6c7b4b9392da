"""The meter against plain loops of transformers over models whose B was scaled by hand; and how often it runs them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from lorazor.adapter.folder import read_adapter
from lorazor.adapter.load import load, swap
from lorazor.adapter.parts import Parts
from lorazor.data.examples import Example, read_examples
from lorazor.errors import MeasureError
from lorazor.measure.meter import CONFIRM, DATA, Meter, Variant, boundary_gates
from lorazor.runs import RunFolder
from lorazor.settings import DataSettings, GenerationSettings
from tests.adapter.test_load import other_adapter
from tests.tiers import fast_first
from tests.tiny_folders import TinyFolders

STACK = "model.layers"
N_EXAMPLES = 6


def make_meter(tiny: TinyFolders, out: Path, batch_size: int = 4, say: Any = lambda message: None) -> Meter:
    """A meter of the tiny adapter, in a new run or in one that goes on."""
    loaded = load(tiny.adapter)
    run = RunFolder.start(out, "test", {}, {}, resume=True)
    reading, generation = DataSettings(batch_size=batch_size), GenerationSettings(max_new_tokens=4)
    meter = Meter(loaded, run, reading, generation, say)
    meter.add(DATA, read_examples(tiny.validation))
    return meter


def random_variants(parts: Parts, n: int) -> list[Variant]:
    """Gates of 0, a half and 1."""
    generator = torch.Generator().manual_seed(0)
    return [Variant(f"v{k}", torch.randint(0, 3, (len(parts),), generator=generator) / 2) for k in range(n)]


def stock_model(tiny: TinyFolders, parts: Parts, gates: torch.Tensor) -> Any:
    """Stock PEFT, with the columns of B multiplied by hand."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny.base), tiny.adapter).eval()
    modules = dict(model.get_base_model().named_modules())
    with torch.no_grad():
        for name, own in parts.by_site(gates).items():
            module: Any = modules[name]
            module.lora_B["default"].weight.mul_(own)
    return model


@torch.no_grad()
def loss_by_hand(model: Any, tokenizer: Any, example: Example) -> tuple[float, int, int]:
    """Nats, answer tokens and right ones: prompt, answer and the end of sequence, one text at a time."""
    prompt = tokenizer(example.prompt).input_ids
    tokens = torch.tensor([[*tokenizer(f"{example.prompt}{example.completion}").input_ids, tokenizer.eos_token_id]])
    labels = tokens.clone()
    labels[:, : len(prompt)] = -100
    output, n_tokens = model(input_ids=tokens, labels=labels), tokens.shape[1] - len(prompt)
    right = (output.logits[:, len(prompt) - 1 : -1].argmax(dim=-1) == tokens[:, len(prompt) :]).sum()
    return float(output.loss) * n_tokens, n_tokens, int(right)


@torch.no_grad()
def text_by_hand(model: Any, tokenizer: Any, example: Example) -> str:
    tokens = torch.tensor([tokenizer(example.prompt).input_ids])
    written = model.generate(input_ids=tokens, attention_mask=tokens**0, max_new_tokens=4, do_sample=False)
    return tokenizer.decode(written[0, tokens.shape[1] :], skip_special_tokens=True)


class Counts:
    """How many rows went through the model, and how many texts through the tokenizer."""

    def __init__(self) -> None:
        self.rows, self.texts, self.failures = 0, 0, 0


@contextmanager
def counting(meter: Meter, monkeypatch, most_rows: int = 1000, error: Exception | None = None) -> Iterator[Counts]:
    """Count what runs inside the block; the model raises the error where a batch has more rows than fit."""
    counts = Counts()
    call = type(meter.loaded.tokenizer).__call__

    def counted_call(self: Any, text: Any = None, *args: Any, **kwargs: Any) -> Any:
        counts.texts += 1
        return call(self, text, *args, **kwargs)

    def counted_pass(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        n_rows = len(kwargs["input_ids"])
        if n_rows > most_rows and error is not None:
            counts.failures += 1
            raise error
        counts.rows += n_rows

    handle = meter.loaded.model.register_forward_pre_hook(counted_pass, with_kwargs=True)
    with monkeypatch.context() as patch:
        patch.setattr(type(meter.loaded.tokenizer), "__call__", counted_call)
        yield counts
    handle.remove()


def numbers(meter: Meter, variants: Sequence[Variant], of: str = DATA) -> torch.Tensor:
    """(n_variants, n_examples) nats."""
    return torch.tensor([[row["nll_nats"] for _, row in sorted(one.items())] for one in meter.losses(variants, of)])


def texts(meter: Meter, variants: Sequence[Variant], of: str = DATA) -> list[list[str]]:
    return [[row["text"] for _, row in sorted(one.items())] for one in meter.answers(variants, of)]


def test_losses_and_answers_are_those_of_models_scaled_by_hand(tiny, out):
    meter = make_meter(tiny, out)
    variants = [*random_variants(meter.parts, 1), meter.base, meter.full]
    losses, answers = meter.losses(variants, DATA), meter.answers(variants, DATA)
    scores = meter.scores("loss", variants, DATA)
    for index, variant in enumerate(variants):
        model, tokenizer = stock_model(tiny, meter.parts, variant.gates), meter.loaded.tokenizer
        by_hand = [loss_by_hand(model, tokenizer, example) for example in meter.examples(DATA)]
        for example, (nats, n_tokens, n_correct) in zip(meter.examples(DATA), by_hand, strict=True):
            row = losses[index][example.index]
            assert row["nll_nats"] == pytest.approx(nats, abs=1e-3)
            assert (row["n_tokens"], row["n_correct"]) == (n_tokens, n_correct)
            assert answers[index][example.index]["text"] == text_by_hand(model, tokenizer, example)
        mean = sum(nats for nats, _, _ in by_hand) / sum(n_tokens for _, n_tokens, _ in by_hand)
        assert scores.values[index] == pytest.approx(mean, abs=1e-4)
    assert len({round(value, 3) for value in scores.values}) == 3  # the gates matter


def test_ten_candidates_tokenise_once_and_are_measured_once(tiny, out, monkeypatch):
    meter = make_meter(tiny, out)
    candidates = random_variants(meter.parts, 10)
    with counting(meter, monkeypatch) as counts:
        meter.add(DATA, read_examples(tiny.validation))
        of_losses = counts.texts
        assert 0 < of_losses <= 2 * N_EXAMPLES  # prompt and whole
        for candidate in candidates:  # as a search goes: each against the full adapter
            meter.scores("loss", [candidate, meter.full, meter.base], DATA)
        meter.scores("loss", candidates, DATA)
        assert (counts.texts, counts.rows) == (of_losses, 12 * N_EXAMPLES)
        first = texts(meter, candidates[:3])
        of_both, counts.rows = counts.texts, 0
        assert texts(meter, candidates[:3]) == first
        assert counts.rows == 0
        texts(meter, candidates[:5])
        assert counts.texts == of_both <= of_losses + 2 * N_EXAMPLES
        expected = numbers(meter, candidates)
    again = make_meter(tiny, out, batch_size=3)  # another batch size measures the same
    with counting(again, monkeypatch) as counts:
        assert torch.equal(numbers(again, candidates), expected)
        assert texts(again, candidates[:3]) == first
        assert (counts.rows, counts.texts) == (0, 0)


@pytest.mark.parametrize("file", ["losses.jsonl", "predictions.jsonl"])
def test_an_interrupted_measurement_goes_on_with_the_batches_that_are_missing(file, tiny, out, monkeypatch):
    """Of the second variant, the examples of the second batch were lost."""
    meter = make_meter(tiny, out)
    variants = random_variants(meter.parts, 2)
    measure = numbers if file == "losses.jsonl" else texts
    expected = measure(meter, variants)
    lines = (out / file).read_text().splitlines()
    lost = {batch.indices for batch in meter.batches(DATA)[1:]}.pop()
    kept = [one for one in map(json.loads, lines) if one["adapter"] == "v0" or one["example"] not in lost]
    assert len(kept) == len(lines) - len(lost) == 2 * N_EXAMPLES - 2
    (out / file).write_text("".join(json.dumps(row) + "\n" for row in kept))
    again = make_meter(tiny, out)
    with counting(again, monkeypatch) as counts:
        found = measure(again, variants)
    assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected)) if measure is numbers else found == expected
    assert counts.rows == len(lost) if measure is numbers else 0 < counts.rows <= 4 * len(lost)  # one row per token
    rows = [json.loads(line) for line in (out / file).read_text().splitlines()]
    assert len({(row["key"], row["example"]) for row in rows}) == len(rows) == 2 * N_EXAMPLES


def test_what_was_measured_is_known_by_its_gates_not_by_its_label(tiny, out, monkeypatch):
    meter = make_meter(tiny, out)
    first, second = random_variants(meter.parts, 2)
    with counting(meter, monkeypatch) as counts:
        one, other = numbers(meter, [first, Variant(first.label, second.gates)])
        assert (one - other).abs().max() > 1e-3
        assert counts.rows == 2 * N_EXAMPLES
        minus = torch.where(first.gates == 0, -0.0, first.gates)
        same = numbers(meter, [first, Variant("another name", first.gates.clone()), Variant("minus zero", minus)])
        assert torch.equal(same[0], same[1]) and torch.equal(same[0], same[2])
        assert counts.rows == 2 * N_EXAMPLES
    n_lines = len((out / "losses.jsonl").read_text().splitlines())
    assert n_lines == 2 * N_EXAMPLES


def test_other_texts_and_other_settings_are_other_measurements(tiny, out, monkeypatch):
    meter = make_meter(tiny, out)
    short = DataSettings(max_length=20, batch_size=4)
    numbers(meter, [meter.full])
    other = Meter(meter.loaded, RunFolder.open(out), short, GenerationSettings(), lambda message: None)
    other.add(DATA, read_examples(tiny.validation))
    assert (numbers(other, [other.full]) - numbers(meter, [meter.full])).abs().max() > 1e-3
    meter.add(DATA, read_examples(tiny.held_out))
    with counting(meter, monkeypatch) as counts:
        numbers(meter, [meter.full])
    assert counts.rows == N_EXAMPLES


ERRORS = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), RuntimeError("CUDA out of memory")]


@pytest.mark.slow
@pytest.mark.parametrize("error", [ERRORS[0], pytest.param(ERRORS[1], marks=pytest.mark.slow)], ids=["torch", "words"])
def test_batches_that_do_not_fit_are_halved_and_the_numbers_are_the_same(error, tiny, out, tmp_path, monkeypatch):
    whole = make_meter(tiny, tmp_path / "whole", batch_size=2)
    variants = random_variants(whole.parts, 3)
    tight = make_meter(tiny, out, batch_size=2)
    with counting(tight, monkeypatch, 1, error) as counts:
        torch.testing.assert_close(numbers(tight, variants), numbers(whole, variants), rtol=0, atol=1e-4)
        assert (counts.failures, counts.rows) == (1, 3 * N_EXAMPLES)  # found out once
    with counting(tight, monkeypatch, 2, error) as counts:
        assert texts(tight, variants) == texts(whole, variants)  # three variants of one prompt do not fit either
        assert counts.failures > 0
        found, counts.failures = numbers(tight, variants), 0
        texts(tight, [tight.full])
        assert counts.failures == 0
    assert len(found) == 3


@pytest.mark.slow
def test_a_single_example_that_does_not_fit_is_an_error_in_words(tiny, out, monkeypatch):
    meter = make_meter(tiny, out, batch_size=1)
    for measure in (numbers, texts):
        with counting(meter, monkeypatch, 0, ERRORS[0]):
            with pytest.raises(MeasureError, match="Memory runs out on a single example.*--max-length"):
                measure(meter, [meter.full])
    assert numbers(meter, [meter.full]).isfinite().all()


def test_other_errors_are_not_taken_for_a_lack_of_memory(tiny, out, monkeypatch):
    meter = make_meter(tiny, out)
    with counting(meter, monkeypatch, 0, RuntimeError("shapes do not match")) as counts:
        with pytest.raises(RuntimeError, match="shapes do not match"):
            numbers(meter, [meter.full])
    assert counts.failures == 1


def test_two_sets_have_files_of_their_own(tiny, out):
    meter = make_meter(tiny, out)
    meter.add(CONFIRM, read_examples(tiny.held_out), "confirm-")
    meter.add("nothing", [])
    one, other = numbers(meter, [meter.full], DATA), numbers(meter, [meter.full], CONFIRM)
    assert (one - other).abs().max() > 1e-3
    model = stock_model(tiny, meter.parts, meter.full.gates)
    by_hand = [loss_by_hand(model, meter.loaded.tokenizer, one)[0] for one in read_examples(tiny.held_out)]
    assert other[0].tolist() == pytest.approx(by_hand, abs=1e-3)
    for file in ("losses.jsonl", "confirm-losses.jsonl"):
        assert len((out / file).read_text().splitlines()) == N_EXAMPLES
    assert meter.examples("nothing") == ()


def test_the_meter_goes_on_with_another_adapter(tiny, out, tmp_path, monkeypatch):
    meter, path = make_meter(tiny, out), other_adapter(tiny, tmp_path / "other")
    first = meter.full
    before = numbers(meter, [first])
    loaded = swap(meter.loaded, read_adapter(path))
    meter.use(loaded, "other")
    with counting(meter, monkeypatch) as counts:
        found = numbers(meter, [first, meter.full])
        assert counts.rows == N_EXAMPLES  # the first one is known
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny.base), path).eval()
    by_hand = [loss_by_hand(model, loaded.tokenizer, one)[0] for one in meter.examples(DATA)]
    assert found[1].tolist() == pytest.approx(by_hand, abs=1e-3)
    assert torch.equal(found[0], before[0]) and (found[0] - found[1]).abs().max() > 1e-3
    second = meter.full
    meter.release()
    assert torch.equal(numbers(meter, [first, second]), found)  # without a model


@pytest.fixture
def boundaries(tiny: TinyFolders, out: Path) -> tuple[Meter, dict[int, Variant], list[str]]:
    """A meter, the adapter at boundaries, and what was said."""
    said: list[str] = []
    meter = make_meter(tiny, out, say=said.append)
    places = (0, 1, 3, 4)
    return meter, {b: Variant(f"b{b}", boundary_gates(meter.parts, STACK, b)) for b in places}, said


@pytest.mark.parametrize("error", [None, ERRORS[0]], ids=["it fits", "memory"])
@pytest.mark.parametrize("engine", fast_first(["auto", "one-pass", "naive"], "auto"))
def test_prefixes_are_boundaries(boundaries, engine, error, tiny, tmp_path, monkeypatch):
    meter, variants, said = boundaries
    with counting(meter, monkeypatch, 2, error) as counts:
        meter.prefixes(variants, DATA, STACK, engine)
        counts.rows = 0
        found = numbers(meter, list(variants.values()))
        meter.prefixes(variants, DATA, STACK, engine)
        assert counts.rows == 0 and (counts.failures > 0) == (error is not None)
    for index, (boundary, variant) in enumerate(variants.items()):
        zeroed = stock_model(tiny, meter.parts, torch.ones(len(meter.parts)))
        for name, parameter in zeroed.named_parameters():
            if "lora_B" in name and any(f"layers.{layer}." in name for layer in range(boundary, 4)):
                parameter.data.zero_()
        by_hand = [loss_by_hand(zeroed, meter.loaded.tokenizer, one)[0] for one in meter.examples(DATA)]
        assert found[index].tolist() == pytest.approx(by_hand, abs=1e-3), variant.label
    assert said == (
        ["engine one-pass: agrees with naive on the first batch at boundaries 0, 1, 3"] * (engine == "auto")
    )


def test_one_pass_on_a_model_that_cannot_is_an_error_in_words(boundaries):
    meter, variants, _ = boundaries
    model: Any = meter.loaded.model
    model.model.layers.append(model.model.layers[1])
    model.config.num_hidden_layers, model.config.layer_types = 5, ["full_attention"] * 5
    with pytest.raises(MeasureError, match=r"^layer 1 of this model runs again.*--engine naive"):
        meter.prefixes(variants, DATA, STACK, "one-pass")


def test_a_loss_that_is_not_a_number_names_example_and_variant(tiny, out):
    meter = make_meter(tiny, out)
    model: PreTrainedModel = meter.loaded.model
    with torch.no_grad():
        next(one for name, one in model.named_parameters() if "lora_B" in name).fill_(float("nan"))
    with pytest.raises(MeasureError, match=r"The loss of example \d with full is nan"):
        meter.losses([meter.full], DATA)
