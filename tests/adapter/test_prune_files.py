"""What pruning does with files: bytes, cards, small files, refusals, full disks, interruptions."""

import errno
import json
import os
import resource
import shutil
import stat
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lorazor.adapter.folder import read_adapter
from lorazor.adapter.prune import select_boundary, write_pruned
from lorazor.errors import BoundaryError, OutputError, SelectionError
from tests.adapter.test_prune import SHAPES, selection_of
from tests.tiny_models import (
    write_adapter_folder,
)


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_two_runs_give_the_same_bytes_whatever_the_order_of_the_input(tmp_path):
    write_adapter_folder(tmp_path / "full", SHAPES, alpha_pattern={"q_proj": 3})
    shutil.copytree(tmp_path / "full", tmp_path / "shuffled")
    weights = tmp_path / "shuffled/adapter_model.safetensors"
    save_file(dict(reversed(load_file(weights).items())), weights, metadata={"written": "today"})
    config_path = tmp_path / "shuffled/adapter_config.json"
    config = json.loads(config_path.read_text())
    config["target_modules"].reverse()
    config_path.write_text(json.dumps(dict(reversed(config.items())), indent=4))
    selection = select_boundary(read_adapter(tmp_path / "full").sites, 2)
    reversed_selection = replace(selection, sites=tuple(reversed(selection.sites)))
    for source, out, chosen in (
        ("full", "one", selection),
        ("full", "two", selection),
        ("shuffled", "three", reversed_selection),
    ):
        write_pruned(tmp_path / source, chosen, tmp_path / out, note="BLEU 51.2 to 51.0")
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(tmp_path / "three")
    with safe_open(tmp_path / "one/adapter_model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_pickle_adapter_becomes_safetensors(tmp_path):
    write_adapter_folder(tmp_path / "full", SHAPES)
    shutil.copytree(tmp_path / "full", tmp_path / "old")
    (tmp_path / "old/adapter_model.safetensors").unlink()
    torch.save(load_file(tmp_path / "full/adapter_model.safetensors"), tmp_path / "old/adapter_model.bin")
    selection = select_boundary(read_adapter(tmp_path / "full").sites, 2)
    write_pruned(tmp_path / "full", selection, tmp_path / "from-new")
    write_pruned(tmp_path / "old", selection, tmp_path / "from-old")
    assert contents(tmp_path / "from-new") == contents(tmp_path / "from-old")


def test_small_files_are_carried_over_and_training_state_is_not(tmp_path, monkeypatch):
    full = write_adapter_folder(tmp_path / "full", SHAPES)
    carried = ["tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja", "merges.txt"]
    carried += ["additional_chat_templates/tool.jinja", "generation_config.json"]
    left = ["optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state.pth", "model.safetensors", ".git/config"]
    left += ["checkpoint-10/adapter_config.json", "runs/events.tfevents", "other/adapter_config.json", "large.txt"]
    for name in carried + left:
        (full / name).parent.mkdir(exist_ok=True)
        (full / name).write_bytes(os.urandom(8))
    (full / "tokenizer.json").rename(tmp_path / "blob")
    (full / "tokenizer.json").symlink_to(tmp_path / "blob")  # as in the cache of the model hub
    (full / "large.txt").write_bytes(bytes(2000))
    monkeypatch.setattr("lorazor.adapter.prune._MAX_CARRIED_BYTES", 1000)
    result = write_pruned(full, select_boundary(read_adapter(full).sites, 2), tmp_path / "pruned")
    written = contents(tmp_path / "pruned")
    assert sorted(written) == sorted([*carried, "README.md", "adapter_config.json", "adapter_model.safetensors"])
    assert all(written[name] == (full / name).read_bytes() for name in carried)
    assert not (tmp_path / "pruned/tokenizer.json").is_symlink()
    assert result.left_out == tuple(sorted({name.split("/")[0] for name in left}))


def test_files_are_as_readable_as_any_other(tmp_path):
    write_adapter_folder(tmp_path / "full", SHAPES)
    chosen = select_boundary(read_adapter(tmp_path / "full").sites, 2)
    result = write_pruned(tmp_path / "full", chosen, tmp_path / "pruned")
    (tmp_path / "any").touch()
    usual = stat.S_IMODE((tmp_path / "any").stat().st_mode)
    assert {stat.S_IMODE(path.stat().st_mode) for path in result.path.iterdir()} == {usual}


CARD = "---\nbase_model: some/model\ntags:\n- lora\n---\n\n# My adapter\r\n\nCaf\u00e9.\n"


def test_the_card_says_what_was_removed_and_keeps_the_rest(tmp_path):
    full = write_adapter_folder(tmp_path / "full", {**SHAPES, "lm_head": (2, 3, 4)})
    (full / "README.md").write_bytes(CARD.encode() + b"\xff\n")  # a stray byte must survive
    chosen = select_boundary(read_adapter(full).sites, 2)
    write_pruned(full, chosen, tmp_path / "one", note="BLEU 51.2 to 51.0")
    one = (tmp_path / "one/README.md").read_bytes()
    assert one.startswith(CARD.encode() + b"\xff\n")
    section = one[len(CARD.encode()) + 2 :].decode()
    assert "keeps 5 of 7 LoRA sites and 70 of 98 LoRA parameters (71.4 %), chosen by `boundary`." in section
    assert "| `model.layers` 0, 1 | 4 of 4 | 56 of 56 |" in section
    assert "| `model.layers` 2 | 0 of 2 | 0 of 28 |" in section
    assert "| outside the layers | 1 of 1 | 14 of 14 |" in section
    assert "Cost: BLEU 51.2 to 51.0" in section

    # The next pruning replaces the section, and only the section.
    (tmp_path / "one/README.md").write_bytes(one + b"Written below.\n")
    only_q = selection_of(tmp_path / "one", lambda name: name.endswith("q_proj"), lambda name: 0.5)
    write_pruned(tmp_path / "one", only_q, tmp_path / "two")
    two = (tmp_path / "two/README.md").read_bytes()
    assert two.startswith(CARD.encode() + b"\xff\n") and two.endswith(b"Written below.\n")
    assert two.count(b"## Pruned with lorazor") == 1 and b"51.2" not in two
    assert b"| `model.layers` 0, 1 | 2 of 4: `q_proj` | 28 of 56 |" in two
    assert b"Into 2 of them a weight other than 1 was folded." in two
    assert b"Cost: not measured." in two


def test_a_missing_card_is_made(tmp_path):
    full = write_adapter_folder(tmp_path / "full", SHAPES, base_model_name_or_path="some/model: \u00e9")
    write_pruned(full, select_boundary(read_adapter(full).sites, 3), tmp_path / "pruned")
    card = (tmp_path / "pruned/README.md").read_text(encoding="utf-8")
    assert card.startswith('---\nbase_model: "some/model: \u00e9"\nlibrary_name: peft\n---\n\n# LoRA adapter\n')
    assert "| `model.layers` 0 to 2 | 6 of 6 | 84 of 84 |" in card


def test_selections_that_do_not_fit_are_refused(tmp_path):
    full = write_adapter_folder(tmp_path / "full", SHAPES)
    selection = selection_of(full, lambda name: True)
    first, *rest = selection.sites
    renamed = replace(first, name="model.layers.9.q_proj")
    for sites, message in [
        ((*selection.sites, renamed), "the adapter has no site 'model.layers.9.q_proj'. Select"),
        ((*rest, renamed), "the adapter has no site 'model.layers.9.q_proj'"),
        (tuple(rest), "says nothing about 'model.layers.0.q_proj'. Give"),
        (tuple(rest[1:]), r"says nothing about 'model.layers.0.q_proj' \(nor 1 more\)"),
        ((*rest, replace(first, rank=5)), "gives model.layers.0.q_proj rank 5, but the adapter has rank 2"),
        (
            tuple(replace(site, keep=False) for site in selection.sites),
            "none of the .* LoRA sites. What remains is the base model: use it without",
        ),
    ]:
        with pytest.raises(SelectionError, match=message):
            write_pruned(full, replace(selection, sites=sites), tmp_path / "pruned")
    assert not (tmp_path / "pruned").exists()


def test_places_that_are_taken_are_left_alone(tmp_path):
    full = write_adapter_folder(tmp_path / "full", SHAPES)
    selection = selection_of(full, lambda name: True)
    before = contents(tmp_path)
    with pytest.raises(OutputError, match="is the adapter itself"):
        write_pruned(full, selection, full / ".." / "full")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="is not empty"):
        write_pruned(full, selection, tmp_path / "taken")
    with pytest.raises(OutputError, match="is a file"):
        write_pruned(full, selection, tmp_path / "taken/mine.txt")
    assert contents(tmp_path) == {**before, "taken/mine.txt": b"mine"}
    (tmp_path / "empty").mkdir()
    assert write_pruned(full, selection, tmp_path / "empty").n_sites_kept == 6


def no_space(*arguments, **settings):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["shutil.copyfile", "pathlib.Path.write_text", "pathlib.Path.rename"])
def test_a_full_disk_leaves_nothing(call, tmp_path, monkeypatch):
    full = write_adapter_folder(tmp_path / "full", SHAPES)
    (full / "tokenizer.json").write_text("{}")
    selection = selection_of(full, lambda name: True)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(call, no_space)
    with pytest.raises(OutputError, match="the disk is full") as caught:
        write_pruned(full, selection, tmp_path / "pruned")
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_weights_that_cannot_be_written_leave_nothing(tmp_path):
    """A real refusal by the operating system, in safetensors' own writing."""
    full = write_adapter_folder(tmp_path / "full", {name: (8, 512, 512) for name in SHAPES})
    selection = selection_of(full, lambda name: True)
    before = sorted(tmp_path.rglob("*"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OutputError, match="Cannot write .*File too large") as caught:
            write_pruned(full, selection, tmp_path / "pruned")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_interruption_leaves_nothing(tmp_path, monkeypatch):
    full = write_adapter_folder(tmp_path / "full", SHAPES)
    selection = selection_of(full, lambda name: True)
    before = sorted(tmp_path.rglob("*"))

    def interrupted(*arguments, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr("lorazor.adapter.prune.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_pruned(full, selection, tmp_path / "pruned")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_boundary_cuts_one_stack_only(tmp_path):
    names = [f"{side}.block.{layer}.q" for side in ("encoder", "decoder") for layer in range(3)]
    full = write_adapter_folder(tmp_path / "full", {name: (2, 3, 4) for name in [*names, "lm_head"]})
    sites = read_adapter(full).sites
    in_encoder, in_decoder = set(names[:3]), set(names[3:])

    def kept(*arguments, **settings):
        return {site.name for site in select_boundary(sites, *arguments, **settings).kept}

    assert kept(0) == {*in_encoder, "lm_head"}
    assert kept(2) == {*in_encoder, *names[3:5], "lm_head"}
    assert kept(3) == {*in_encoder, *in_decoder, "lm_head"}
    assert kept(1, stack="encoder") == {names[0], *in_decoder, "lm_head"}
    assert kept(1, drop_outside=True) == {*in_encoder, names[3]}
    selection = select_boundary(sites, np.int64(2))
    assert selection.method == "boundary"
    settings = {"boundary": 2, "stack": "decoder.block", "n_layers": 3, "drop_outside": False}
    assert json.loads(selection.to_json())["settings"] == settings
    for boundary in (-1, 4, 1.5):
        with pytest.raises(
            BoundaryError, match=f"boundary={boundary}, but LoRA reaches over 3 layers of decoder.block"
        ):
            select_boundary(sites, boundary)


def test_the_base_model_is_never_loaded(tmp_path, monkeypatch):
    full = write_adapter_folder(tmp_path / "full", SHAPES, base_model_name_or_path=str(Path("/nowhere/at/all")))

    def refuse(*arguments, **settings):
        raise AssertionError("a module was built")

    monkeypatch.setattr(nn.Module, "__init__", refuse)
    assert write_pruned(full, select_boundary(read_adapter(full).sites, 1), tmp_path / "pruned").n_sites_kept == 2
