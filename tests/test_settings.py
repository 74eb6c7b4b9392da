"""Settings of the wrong type are not made, and those that cannot work are refused before anything is written."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

import lorazor
from lorazor import settings as all_settings
from lorazor.fields import Settings
from lorazor.report import settings as settings_of_report
from lorazor.serve import settings as settings_of_serving
from tests.test_public_api import refuses, selecting, training
from tests.tiny_folders import TinyFolders

WRONG = {int: (1.5, "1", True, math.nan), float: (math.nan, math.inf, "1", True), bool: (1, "yes"), str: (1, 0.5)}
SETTINGS = sorted(name for name in lorazor.__all__ if name.endswith("Settings"))


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_the_wrong_type_are_not_made(name):
    settings, n_fields = getattr(lorazor, name), 0
    assert issubclass(settings, Settings)
    for field, hint in get_type_hints(settings).items():
        kinds = [one for one in WRONG if one in (hint, *get_args(hint))]
        for value in WRONG[kinds[0]] if kinds else (object(),):
            message = refuses(lambda field=field, value=value: settings(**{field: value}))
            assert message.startswith(f"{field}=")
            n_fields += 1
    assert n_fields > 0


def test_all_settings_are_public():
    modules = (all_settings, settings_of_serving, settings_of_report)
    of_modules = {name for module in modules for name in vars(module) if name.endswith("Settings")}
    assert of_modules - {"Settings"} == set(SETTINGS)


GROUPS: list[tuple[type, dict[str, Any]]] = [
    (lorazor.ModelSettings, {"task": "magic"}),
    (lorazor.ModelSettings, {"dtype": "int3"}),
    (lorazor.DataSettings, {"batch_size": 0}),
    (lorazor.DataSettings, {"limit": 0}),
    (lorazor.GenerationSettings, {"max_new_tokens": 0}),
    (lorazor.FitSettings, {"precision": "int3"}),
    (lorazor.FitSettings, {"weight_decay": -1.0}),
    (lorazor.FitSettings, {"seed": -1}),
    (lorazor.ChoosingSettings, {"schedule": "magic"}),
    (lorazor.ShrinkSettings, {"by": "magic"}),
    (lorazor.ShrinkSettings, {"score": "gate"}),
    (lorazor.ShrinkSettings, {"seed": -1}),
    (lorazor.BoundarySettings, {"rule": "magic"}),
    (lorazor.BoundarySettings, {"engine": "magic"}),
    (lorazor.TrainSettings, {"method": "magic"}),
    (lorazor.TrainSettings, {"start": "magic"}),
]


@pytest.mark.parametrize(("settings", "values"), GROUPS)
def test_settings_out_of_their_range_are_not_made(settings, values):
    assert refuses(lambda: settings(**values)).startswith(f"{next(iter(values))}=")


BAD: dict[str, list[dict[str, Any]]] = {
    "shrink": [
        *({"margin": margin} for margin in ("", "nan%", "-1%", "2", "loss=nan", "loss=-1", "magic=1", "rougeL=")),
        *({"size": size} for size in ("", "abc", "-1MB", "nanMB", "0")),
        *({"params_fraction": fraction} for fraction in (0, -1, 2)),
        *({"max_rank": rank} for rank in (0, -1)),
        *({"params": params} for params in (0, -5)),
        {"margin": "2%", "params": 100},
        {"energy": 0.5},
        {"by": "prefix", "stack": "zz"},
        {"heal": "{data}"},
        {"points": 0},
        {"score_examples": 0},
    ],
    "find_boundary": [
        *({"select_by": metric} for metric in ("magic", "", "accuracy")),
        *({"rule": "manual", "boundary": boundary} for boundary in (None, -1, 5)),
        *({"boundaries": text} for text in ("", "x", "9", "3:1", "-1")),
        {"rule": "at-most"},
        {"margin": "two"},
        {"boundary": 2},
        {"stack": "zz"},
    ],
    "measure_curves": [{"stack": "zz"}, {"stack": ""}, {"settled_within": -0.1}, {"settled_within": 2}],
    "evaluate": [*({"metrics": text} for text in ("magic", "", ",", "loss,loss", "accuracy"))],
    "train_adapter": [
        *({"fit": lorazor.FitSettings(steps=steps)} for steps in (0, -1)),
        *({"fit": lorazor.FitSettings(learning_rate=rate)} for rate in (0, -1)),
        {"fit": lorazor.FitSettings(save_steps=0)},
        {"fit": lorazor.FitSettings(rise_steps=-1)},
        *({"lora": lorazor.LoraSettings(rank=rank)} for rank in (0, -1)),
        {"lora": lorazor.LoraSettings(alpha=0)},
        *({"lora": lorazor.LoraSettings(dropout=dropout)} for dropout in (-0.1, 1)),
        {"budget": lorazor.BudgetSettings(keep=2)},
        {"method": "weightlora"},
        {"selection": "none.json"},
        {"selection": "none.json", "method": "weightlora"},
        {"model": lorazor.ModelSettings()},
        {"model": lorazor.ModelSettings("/nowhere/at/all")},
        {"report_to": "magic"},
    ],
    "select_sites": [
        *({"budget": lorazor.BudgetSettings(keep=keep)} for keep in (None, 0, -1, 99)),
        *({"budget": lorazor.BudgetSettings(keep_fraction=fraction)} for fraction in (0, -1, 2)),
        *({"budget": lorazor.BudgetSettings(params=params)} for params in (0, 1)),
        {"budget": lorazor.BudgetSettings(keep=1, params=1)},
        *({"budget": lorazor.BudgetSettings(step_time=share)} for share in (0, 1, -0.5)),
        *({"budget": lorazor.BudgetSettings(memory=size)} for size in ("0", "1", "nan", "12", "12TBs", "")),
        {"budget": lorazor.BudgetSettings(step_time=0.5), "choosing": lorazor.ChoosingSettings(schedule="every-step")},
        {"budget": lorazor.BudgetSettings(memory="1GB"), "grow": True},
        *({"choosing": lorazor.ChoosingSettings(score=score)} for score in ("magic", "credit")),
        *({"choosing": lorazor.ChoosingSettings(select_steps=steps)} for steps in (0, 99)),
        {"choosing": lorazor.ChoosingSettings(gate_lr=0)},
        {"choosing": lorazor.ChoosingSettings(schedule="every-step", score="probe")},
    ],
    "prune": [*({"boundary": boundary} for boundary in (None, -1, 0, 9)), {"boundary": 2, "stack": "zz"}],
}


def calls_with(tiny: TinyFolders, verb: str, values: dict[str, Any], out: Path) -> Callable[[], Any]:
    data = str(tiny.validation)
    values = {name: value.format(data=data) if isinstance(value, str) else value for name, value in values.items()}
    kinds = {
        "shrink": lorazor.ShrinkSettings,
        "find_boundary": lorazor.BoundarySettings,
        "measure_curves": lorazor.CurvesSettings,
        "prune": lorazor.PruneSettings,
    }
    if verb == "evaluate":
        return lambda: lorazor.evaluate([tiny.adapter], data, out=out, settings=lorazor.EvalSettings(**values))
    if verb == "train_adapter":
        return lambda: lorazor.train_adapter(data, out=out, settings=training(tiny, **values))
    if verb == "select_sites":
        return lambda: lorazor.select_sites(data, out=out, settings=selecting(tiny, **values))
    inputs = [tiny.adapter] if verb == "prune" else [tiny.adapter, data]
    return lambda: getattr(lorazor, verb)(*inputs, out=out, settings=kinds[verb](**values))


@pytest.mark.parametrize(("verb", "values"), [(verb, values) for verb, each in BAD.items() for values in each])
def test_settings_that_cannot_work(tiny, out, verb, values):
    refuses(calls_with(tiny, verb, values, out))
    assert not out.exists()
