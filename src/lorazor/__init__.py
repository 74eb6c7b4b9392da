"""lorazor makes LoRA adapters as small as they can be at no loss that matters, and shows that it is so.

Every command is a function with one settings object and one result, named after the command:

    shrink          ShrinkSettings    ShrinkResult
    inspect         InspectSettings   InspectResult
    export          ExportSettings    ExportResult
    plan_fleet      FleetSettings     FleetResult
    train_adapter   TrainSettings     TrainResult
    select_sites    SelectSettings    SelectResult
    find_boundary   BoundarySettings  BoundaryResult
    measure_curves  CurvesSettings    CurvesResult
    prune           PruneSettings     PruneResult
    evaluate        EvalSettings      EvalResult
    report_runs     ReportSettings    ReportResult

A function is a verb; it names its object where the command is a noun, or is called like a folder of this package.

The public names are imported when they are first used: torch takes seconds to load, `lorazor --help` should not.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorazor.adapter.gates import fold_, gated, silenced, site_gates
    from lorazor.adapter.load import Loaded, load
    from lorazor.adapter.parts import Parts
    from lorazor.adapter.prune import PruneResult, select_boundary
    from lorazor.adapter.sites import LiveSite, Site, find_sites
    from lorazor.data.examples import Example, read_examples
    from lorazor.errors import LorazorError
    from lorazor.measure.metrics import text_scores
    from lorazor.report.settings import ReportSettings
    from lorazor.select.verdict import Verdict
    from lorazor.selection import SelectedSite, Selection
    from lorazor.serve.settings import ExportSettings, FleetSettings, InspectSettings
    from lorazor.settings import (
        BoundarySettings,
        BudgetSettings,
        ChoosingSettings,
        CurvesSettings,
        DataSettings,
        EvalSettings,
        ExampleSettings,
        FitSettings,
        GenerationSettings,
        LoraSettings,
        ModelSettings,
        PruneSettings,
        SelectSettings,
        ShrinkSettings,
        TrainSettings,
    )
    from lorazor.train.callback import WeightLora
    from lorazor.workflow.boundary import BoundaryResult, find_boundary
    from lorazor.workflow.curves import CurvesResult, measure_curves
    from lorazor.workflow.evaluate import EvalResult, evaluate
    from lorazor.workflow.export import ExportResult, export
    from lorazor.workflow.fleet import FleetResult, plan_fleet
    from lorazor.workflow.inspect import InspectResult, inspect
    from lorazor.workflow.kept import kept
    from lorazor.workflow.prune import prune
    from lorazor.workflow.report import ReportResult, report_runs
    from lorazor.workflow.shrink import ShrinkResult, shrink
    from lorazor.workflow.train import SelectResult, TrainResult, select_sites, train_adapter

__version__ = "0.1.0"

_NAMES = {
    "adapter.gates": "fold_ gated silenced site_gates",
    "adapter.load": "Loaded load",
    "adapter.parts": "Parts",
    "adapter.prune": "PruneResult select_boundary",
    "adapter.sites": "LiveSite Site find_sites",
    "data.examples": "Example read_examples",
    "errors": "LorazorError",
    "measure.metrics": "text_scores",
    "report.settings": "ReportSettings",
    "select.verdict": "Verdict",
    "selection": "SelectedSite Selection",
    "serve.settings": "ExportSettings FleetSettings InspectSettings",
    "settings": (
        "BoundarySettings BudgetSettings ChoosingSettings CurvesSettings DataSettings EvalSettings "
        "ExampleSettings FitSettings GenerationSettings LoraSettings ModelSettings PruneSettings "
        "SelectSettings ShrinkSettings TrainSettings"
    ),
    "train.callback": "WeightLora",
    "workflow.boundary": "BoundaryResult find_boundary",
    "workflow.curves": "CurvesResult measure_curves",
    "workflow.evaluate": "EvalResult evaluate",
    "workflow.export": "ExportResult export",
    "workflow.fleet": "FleetResult plan_fleet",
    "workflow.inspect": "InspectResult inspect",
    "workflow.kept": "kept",
    "workflow.prune": "prune",
    "workflow.report": "ReportResult report_runs",
    "workflow.shrink": "ShrinkResult shrink",
    "workflow.train": "SelectResult TrainResult select_sites train_adapter",
}
"""The public names by the module that has them."""

_HOMES = {name: home for home, names in _NAMES.items() for name in names.split()}

__all__ = [
    "BoundaryResult", "BoundarySettings", "BudgetSettings", "ChoosingSettings", "CurvesResult", "CurvesSettings",
    "DataSettings", "EvalResult", "EvalSettings", "Example", "ExampleSettings", "ExportResult", "ExportSettings",
    "FitSettings", "FleetResult", "FleetSettings", "GenerationSettings", "InspectResult", "InspectSettings", "LiveSite",
    "Loaded", "LoraSettings", "LorazorError", "ModelSettings", "Parts", "PruneResult", "PruneSettings", "ReportResult",
    "ReportSettings", "SelectResult", "SelectSettings", "SelectedSite", "Selection", "ShrinkResult", "ShrinkSettings",
    "Site", "TrainResult", "TrainSettings", "Verdict", "WeightLora", "evaluate", "export", "find_boundary",
    "find_sites", "fold_", "gated", "inspect", "kept", "load", "measure_curves", "plan_fleet", "prune", "read_examples",
    "report_runs", "select_boundary", "select_sites", "shrink", "silenced", "site_gates", "text_scores",
    "train_adapter",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lorazor' has no attribute {name!r}")
    return getattr(import_module(f"lorazor.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
