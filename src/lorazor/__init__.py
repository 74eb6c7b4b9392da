"""lorazor makes LoRA adapters as small as they can be at no loss that matters, and shows that it is so.

The public names, each imported when it is first used: torch takes seconds to load, `lorazor --help` should not.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorazor.adapter.gates import fold_, gated, silenced, site_gates
    from lorazor.adapter.load import Loaded, load
    from lorazor.adapter.parts import Parts
    from lorazor.adapter.prune import prune, select_boundary
    from lorazor.adapter.sites import LiveSite, Site, find_sites
    from lorazor.data.examples import Example, read_examples
    from lorazor.errors import LorazorError
    from lorazor.measure.metrics import text_scores
    from lorazor.selection import SelectedSite, Selection
    from lorazor.settings import ShrinkSettings
    from lorazor.train.callback import WeightLora
    from lorazor.workflow.boundary import BoundarySettings, find_boundary
    from lorazor.workflow.curves import measure_curves
    from lorazor.workflow.evaluate import EvaluationSettings, evaluate
    from lorazor.workflow.prune import prune_adapter
    from lorazor.workflow.shrink import shrink
    from lorazor.workflow.train import TrainingSettings, select_sites, train_adapter

__version__ = "0.1.0"

_HOMES = {
    "BoundarySettings": "workflow.boundary",
    "EvaluationSettings": "workflow.evaluate",
    "Example": "data.examples",
    "LiveSite": "adapter.sites",
    "Loaded": "adapter.load",
    "LorazorError": "errors",
    "Parts": "adapter.parts",
    "SelectedSite": "selection",
    "Selection": "selection",
    "ShrinkSettings": "settings",
    "Site": "adapter.sites",
    "TrainingSettings": "workflow.train",
    "WeightLora": "train.callback",
    "evaluate": "workflow.evaluate",
    "find_boundary": "workflow.boundary",
    "find_sites": "adapter.sites",
    "fold_": "adapter.gates",
    "gated": "adapter.gates",
    "load": "adapter.load",
    "measure_curves": "workflow.curves",
    "prune": "adapter.prune",
    "prune_adapter": "workflow.prune",
    "read_examples": "data.examples",
    "select_boundary": "adapter.prune",
    "select_sites": "workflow.train",
    "shrink": "workflow.shrink",
    "silenced": "adapter.gates",
    "site_gates": "adapter.gates",
    "text_scores": "measure.metrics",
    "train_adapter": "workflow.train",
}

__all__ = [
    "BoundarySettings",
    "EvaluationSettings",
    "Example",
    "LiveSite",
    "Loaded",
    "LorazorError",
    "Parts",
    "SelectedSite",
    "Selection",
    "ShrinkSettings",
    "Site",
    "TrainingSettings",
    "WeightLora",
    "evaluate",
    "find_boundary",
    "find_sites",
    "fold_",
    "gated",
    "load",
    "measure_curves",
    "prune",
    "prune_adapter",
    "read_examples",
    "select_boundary",
    "select_sites",
    "shrink",
    "silenced",
    "site_gates",
    "text_scores",
    "train_adapter",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lorazor' has no attribute {name!r}")
    return getattr(import_module(f"lorazor.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
