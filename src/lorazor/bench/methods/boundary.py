"""The boundary of arXiv:2503.23360: LoRA of all sites, cut above the layer that validation examples choose."""

from pathlib import Path
from typing import Literal

from lorazor import find_boundary, measure_curves
from lorazor.bench.experiment import Experiment
from lorazor.bench.recipes import data_settings, generation_settings

Rule = Literal["best", "one-se", "manual"]

BUDGETS = ()
IS_SHARED = True


def train(experiment: Experiment, *, rule: Rule = "one-se", select_by: str = "loss") -> Path | None:
    """`lorazor boundary`; None where nothing is left.

    The rule `manual` reads the boundary off the curves of `lorazor curves`; nothing goes where they do not part.
    """
    source = experiment.lora()
    number, fields = None, {"model": experiment.model, "reading": data_settings(experiment.cell)}
    if rule == "manual":
        curves = measure_curves(source, experiment.validation, out=experiment.new("curves"), **fields)
        if (number := curves.proposal.boundary) is None:
            return source
    result = find_boundary(
        source, experiment.validation, out=experiment.new("boundary"), rule=rule, select_by=select_by, boundary=number,
        generation=generation_settings(experiment.cell), seed=experiment.cell.seed, **fields,
    )  # fmt: skip
    if result.pruned is not None:
        return Path(result.pruned.path)
    return None if result.nothing_left else source
