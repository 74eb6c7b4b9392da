"""What commands print at 80 columns: whole numbers, true sentences, and a next command that works as it stands."""

from __future__ import annotations

import json
import shlex

import pytest
from peft import get_peft_model

from lorazor.cli.curves import print_result
from lorazor.measure.curves import CurvePoint
from lorazor.select.boundary import Proposal
from lorazor.workflow.curves import CurvesResult
from tests.tiny_models import lora_config, randomise_b_, tiny_model
from tests.workflow.planted import plant


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def tables(text: str) -> str:
    """What is printed in tables; sentences are wrapped by the terminal."""
    return "\n".join(line for line in text.splitlines() if len(line) <= 80)


def next_command(text: str) -> list[str]:
    last = text.rstrip().splitlines()[-1]
    assert last.startswith("  lorazor ")
    return shlex.split(last)[1:]


@pytest.fixture(scope="module")
def gaining(tiny, tmp_path_factory):
    """Data on which the adapter of the tests gains."""
    return plant(tiny.base, tiny.adapter, tmp_path_factory.mktemp("gaining"))


@pytest.fixture(scope="module")
def encoder_decoders(tmp_path_factory):
    """Adapter folders of a T5 and a BART, as PEFT saves them."""
    root = tmp_path_factory.mktemp("encoder-decoders")
    for family in ("t5", "bart"):
        model = get_peft_model(tiny_model(family), lora_config(family))
        randomise_b_(model)
        model.save_pretrained(root / family)
    return root


@pytest.mark.parametrize(("family", "n_decoder"), [("t5", 10), ("bart", 10)])
def test_inspect_of_an_encoder_decoder_shows_every_norm(lorazor, encoder_decoders, family, n_decoder):
    _, text, _ = lorazor("inspect", encoder_decoders / family, "--json")
    norms = [f"{site['norm']:.3g}" for site in json.loads(text)["sites"]]
    status, text, _ = lorazor("inspect", encoder_decoders / family)
    assert status == 0 and "…" not in text and "..." not in text
    _, encoder, decoder = text.split("norm of s B A")
    shown = [word for part in (encoder, decoder) for word in part.split("What its sites")[0].split()]
    assert all(shown.count(norm) >= norms.count(norm) for norm in norms)
    (row,) = [line.split() for line in decoder.splitlines() if line.split()[:1] == ["2"]]
    assert len(row) == 1 + n_decoder
    norms_alone = text.partition("\npeft ")[0].splitlines()
    assert all(len(line) <= 80 for line in norms_alone if "sites" not in line)


def test_experts_of_a_kind_have_one_norm_together(lorazor, tmp_path):
    from tests.tiny_models import write_adapter_folder

    names = [f"model.layers.0.mlp.experts.{expert}.up_proj" for expert in range(3)]
    folder = write_adapter_folder(tmp_path / "experts", {name: (2, 6, 5) for name in names})
    _, text, _ = lorazor("inspect", folder, "--json")
    norms = [site["norm"] for site in json.loads(text)["sites"]]
    _, text, _ = lorazor("inspect", folder)
    assert f"{sum(norm**2 for norm in norms) ** 0.5:.3g}" in text and "together" in text


def test_curves_of_a_large_model_are_readable(tmp_path, capsys):
    """Ranks of five digits, layers of two digits."""
    points = [
        CurvePoint(variant, layer, 0.123, 0.01, 11.25, 0.1, 12345.5)
        for variant in ("adapter", "base")
        for layer in range(31)
    ]
    gap = [{"layer": layer, "gap": -0.1234, "standard_error": 0.0123} for layer in range(31)]
    print_result(CurvesResult(tmp_path, 128, 4321, "model.layers", 30, Proposal(24, 3, "A reason."), gap, points))
    text = capsys.readouterr().out
    assert all(len(line) <= 80 for line in text.splitlines())
    assert text.count("12345.5") == 62 and text.count("11.25") == 62 and "→ 24" in text


def test_prune_says_which_stack_it_cut(lorazor, encoder_decoders, tiny, tmp_path):
    for stack, cut, whole in (
        ([], "decoder.block", "encoder.block"),
        (["--stack", "encoder.block"], "encoder.block", "decoder.block"),
    ):
        out = tmp_path / cut
        status, text, _ = lorazor("prune", encoder_decoders / "t5", "--boundary", 1, *stack, "--out", out)
        assert status == 0 and f"1 of 3 layers of {cut}; {whole} stays whole" in text
    status, text, _ = lorazor("prune", tiny.adapter, "--boundary", 1, "--out", tmp_path / "one")
    assert status == 0 and "1 of 4 layers of model.layers." in text and "stays whole" not in text


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "{adapter}"],
        ["shrink", "{adapter}", "--energy", "0.9", "--out", "my run"],
        ["shrink", "{adapter}", "--data", "{own}", "--params-fraction", "0.5", "--limit", "5", "--out", "my run"],
        ["shrink", "{adapter}", "--data", "{own}", "--margin", "loss=1e-9", "--by", "layer", "--out", "my run"],
        ["shrink", "{adapter}", "--data", "{own}", "--confirm", "{own test}", "--margin", "40%", "--out", "my run"],
        ["prune", "{adapter}", "--boundary", "2", "--out", "my run"],
        ["boundary", "{adapter}", "--data", "{data}", "--rule", "manual", "--boundary", "2", "--out", "my run"],
        ["boundary", "{adapter}", "--data", "{own}", "--rule", "manual", "--boundary", "4", "--out", "my run"],
        ["boundary", "{adapter}", "--data", "{data}", "--rule", "manual", "--boundary", "0", "--out", "my run"],
        ["boundary", "{adapter}", "--data", "{own}", "--confirm", "{own test}", "--boundaries", "2", "--out", "my run"],
        ["curves", "{adapter}", "--data", "{data}", "--batch-size", "3", "--out", "my run"],
        ["eval", "{adapter}", "--data", "{data}", "--out", "my run"],
    ],
    ids=lambda arguments: "-".join(part.strip("-{}") for part in arguments if part != "my run"),
)  # fmt: skip
def test_the_next_command_works_as_it_stands(lorazor, tiny, gaining, tmp_path, monkeypatch, arguments):
    """Copied into a shell; only capitals are for the user to fill in. What was there before is in nobody's way."""
    monkeypatch.chdir(tmp_path)
    for ending in ("eval", "shrink", "boundary"):
        (tmp_path / f"my run-{ending}").mkdir()
        (tmp_path / f"my run-{ending}" / "mine.txt").write_text("mine")
    places = {"adapter": tiny.adapter, "data": tiny.validation, "test": tiny.held_out, "base": tiny.base}
    places |= {"own": gaining.data, "own test": gaining.held_out}
    status, text, messages = lorazor(*(part.format(**places) for part in arguments))
    assert status == 0, messages
    given = {"TEST.jsonl": str(tiny.held_out), "VALIDATION.jsonl": gaining.data}
    status, _, messages = lorazor(*(given.get(word, word) for word in next_command(text)))
    assert status == 0, messages


def test_nothing_is_judged_against_itself(lorazor, tiny, gaining, tmp_path):
    """No measurement on held-out examples, no verdict on screen, in the run, on the page."""
    small = ["--data", gaining.data, "--confirm", gaining.held_out]
    boundary = ["boundary", tiny.adapter, *small, "--rule", "manual", "--boundary", 4]
    shrink = ["shrink", tiny.adapter, *small, "--max-rank", 4, "--uniform", "--points", 1]
    for name, arguments in (("boundary", boundary), ("shrink", shrink)):
        out = tmp_path / name
        status, text, messages = lorazor(*arguments, "--out", out)
        assert status == 0 and "On 8 held-out" not in text + messages and "held" not in text
        assert "Nothing was dropped, so there is nothing to judge." in text or "Nothing is dropped" in text
        found = json.loads((out / ("choice.json" if name == "boundary" else "shrink.json")).read_text())
        assert found["verdict"] is None and not (out / "adapter").exists()
