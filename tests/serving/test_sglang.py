"""Adapters of every form in SGLang's own loader, of the wheel, as the table says; and exported, none refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import lorazor
from lorazor.adapter.folder import read_adapter
from lorazor.serve.base import outline_base
from lorazor.serve.form import Form
from lorazor.serve.judging import judge, server_named
from lorazor.settings import ModelSettings
from tests.serve.forms import FORMS, N_LAYERS, write_form
from tests.serving.running import run_in

pytestmark = [
    pytest.mark.serving,
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'. .* LoRA tensor.* have invalid shape"),
]
BESIDE = ("DoRA",)
"""Refused by the manager of the server, which asks for `use_dora` of the config before anything is loaded."""


def test_every_form_as_the_table_says_and_exported(tiny, tmp_path):
    settings, exported = ModelSettings(str(tiny.base)), {}
    adapters = {form: write_form(tiny.base, form, tmp_path / form.replace(" ", "-")).path for form in FORMS}
    said = {}
    for form, path in adapters.items():
        folder = read_adapter(path)
        said[form] = judge(Form(folder, outline_base(folder, settings)), server_named("sglang")).outcome
        try:
            out = tmp_path / "exported" / path.name
            exported[f"exported {form}"] = lorazor.export(
                path, "sglang", out=out, verify=False, drop_modules_to_save=True, model=settings
            ).path
        except lorazor.LorazorError:
            assert said[form] != "right"
    job = {"n_layers": N_LAYERS, "adapters": {name: str(path) for name, path in {**adapters, **exported}.items()}}
    found = run_in("SGLANG", "in_sglang.py", job, tmp_path / "result.json")
    for form, outcome in said.items():
        if form in BESIDE:
            assert outcome == "refused" and (found[form].get("use_dora") or "error" in found[form])
        else:
            assert ("error" in found[form]) == (outcome in ("refused", "crashes")), (form, found[form])
            assert found[form].get("when") != "the first batch" or outcome == "crashes", form
    for name, path in exported.items():
        config = json.loads(Path(path, "adapter_config.json").read_text())
        assert found[name]["scaling"] == pytest.approx(config["lora_alpha"] / config["r"]), found[name]
