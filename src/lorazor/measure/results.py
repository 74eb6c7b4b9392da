"""What was measured, as run folders hold it and reports read it. This module never imports torch."""

from __future__ import annotations

from dataclasses import dataclass

from lorazor.measure.stats import Interval


@dataclass(frozen=True)
class Candidate:
    """A smaller adapter that was measured on the validation examples.

    Attributes:
        label: names it in the files of the run.
        n_sites: sites that keep LoRA.
        n_parameters: numbers in A and B that stay.
        value: the metric.
        lost: how much worse than the full adapter; None where it was not compared.
        lost_at_most: upper bound of it, one-sided 95 %.
        is_healed: whether what stays was trained to make up for what went.
    """

    label: str
    n_sites: int
    n_parameters: int
    value: float
    lost: float | None = None
    lost_at_most: float | None = None
    is_healed: bool = False


@dataclass(frozen=True)
class Evaluated:
    """One metric of one adapter.

    Attributes:
        adapter: the adapter as given; `base` is the base model alone.
        metric: name of the metric.
        value: on all examples.
        difference: to the first adapter, paired, with a 95 % interval.
        n_examples: examples.
    """

    adapter: str
    metric: str
    value: float
    difference: Interval
    n_examples: int


@dataclass(frozen=True)
class CurvePoint:
    """One variant at one layer, over all examples.

    Attributes:
        variant: `adapter` or `base`.
        layer: layers that have run.
        probability: of the true token, mean over all answer tokens.
        probability_standard_error: of that mean, over examples.
        entropy_nats: of the distribution, mean over all answer tokens.
        entropy_standard_error: of that mean, over examples.
        median_rank: of the true token, over all answer tokens; 1 is best.
    """

    variant: str
    layer: int
    probability: float
    probability_standard_error: float
    entropy_nats: float
    entropy_standard_error: float
    median_rank: float
