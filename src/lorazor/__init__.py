"""lorazor keeps only the LoRA adapters a model needs.

The public names, each imported when it is first used: torch takes seconds to load, `lorazor --help` should not.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorazor.adapter.gates import fold_, gated, row_gated, silenced
    from lorazor.adapter.load import Loaded, load
    from lorazor.adapter.prune import prune, select_boundary
    from lorazor.adapter.sites import LiveSite, Site, find_sites
    from lorazor.data.examples import Example, read_examples
    from lorazor.errors import LorazorError
    from lorazor.measure.metrics import text_scores
    from lorazor.measure.sweep import Sweep, sweep
    from lorazor.select.boundary import choose_boundary, confirm_boundary
    from lorazor.selection import SelectedSite, Selection
    from lorazor.train.callback import WeightLora
    from lorazor.workflow.boundary import find_boundary
    from lorazor.workflow.curves import measure_curves
    from lorazor.workflow.evaluate import evaluate
    from lorazor.workflow.prune import prune_adapter
    from lorazor.workflow.score import score_adapter
    from lorazor.workflow.subset import find_subset
    from lorazor.workflow.train import TrainingSettings, select_sites, train_adapter
    from lorazor.workflow.variants import SubsetSettings

__version__ = "0.1.0"

_HOMES = {
    "Example": "data.examples",
    "LiveSite": "adapter.sites",
    "Loaded": "adapter.load",
    "LorazorError": "errors",
    "SelectedSite": "selection",
    "Selection": "selection",
    "Site": "adapter.sites",
    "SubsetSettings": "workflow.variants",
    "Sweep": "measure.sweep",
    "TrainingSettings": "workflow.train",
    "WeightLora": "train.callback",
    "choose_boundary": "select.boundary",
    "confirm_boundary": "select.boundary",
    "evaluate": "workflow.evaluate",
    "find_boundary": "workflow.boundary",
    "find_sites": "adapter.sites",
    "find_subset": "workflow.subset",
    "fold_": "adapter.gates",
    "gated": "adapter.gates",
    "load": "adapter.load",
    "measure_curves": "workflow.curves",
    "prune": "adapter.prune",
    "prune_adapter": "workflow.prune",
    "read_examples": "data.examples",
    "row_gated": "adapter.gates",
    "score_adapter": "workflow.score",
    "select_boundary": "adapter.prune",
    "select_sites": "workflow.train",
    "silenced": "adapter.gates",
    "sweep": "measure.sweep",
    "text_scores": "measure.metrics",
    "train_adapter": "workflow.train",
}

__all__ = [
    "Example",
    "LiveSite",
    "Loaded",
    "LorazorError",
    "SelectedSite",
    "Selection",
    "Site",
    "SubsetSettings",
    "Sweep",
    "TrainingSettings",
    "WeightLora",
    "choose_boundary",
    "confirm_boundary",
    "evaluate",
    "find_boundary",
    "find_sites",
    "find_subset",
    "fold_",
    "gated",
    "load",
    "measure_curves",
    "prune",
    "prune_adapter",
    "read_examples",
    "row_gated",
    "score_adapter",
    "select_boundary",
    "select_sites",
    "silenced",
    "sweep",
    "text_scores",
    "train_adapter",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lorazor' has no attribute {name!r}")
    return getattr(import_module(f"lorazor.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
