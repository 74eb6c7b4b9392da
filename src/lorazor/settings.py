"""The settings of every command, as frozen dataclasses.

The command line is generated from them: a field is an option, its annotation holds the help text.
This file imports nothing heavy, so that `lorazor --help` answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

By = Literal["site", "group", "kind", "layer", "window"]
"""What is dropped together."""

ToleranceRule = Literal["one-se", "no-worse"]
"""When a selection is no worse than the full adapter."""

ScoreMethod = Literal["credit", "taylor", "output-norm", "norm", "random", "first-layers", "last-layers", "every-other"]
"""What the sites of a trained adapter are ranked by."""

Tracker = Literal["none", "tensorboard", "trackio"]
"""Where the headline numbers of a finished run are logged, beside its run folder."""


@dataclass(frozen=True)
class ModelSettings:
    """Which base model, and how to load it."""

    model: Annotated[
        str | None, "Base model: hub id or folder. Default: the one the adapter's config names; a training needs it."
    ] = None
    gguf_file: Annotated[str | None, "Name of the GGUF file inside the --model folder."] = None
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        "Number format of the base weights; auto is float32 on CPU, else the format they are stored in.",
    ] = "auto"
    device_map: Annotated[
        str | None, "accelerate's device map, such as auto or cuda:1. Default: cuda if there is one."
    ] = None
    task: Annotated[
        Literal["auto", "causal", "seq2seq", "classification", "question-answering"],
        "What the model does; auto tells it from the base model, the adapter and, in training, the data.",
    ] = "auto"


@dataclass(frozen=True)
class DataSettings:
    """How to read the examples and cut them into batches."""

    prompt_column: Annotated[
        str | None, "Column with the prompt (or text). Default: prompt, messages, text, sentence."
    ] = None
    completion_column: Annotated[str | None, "Column with the answer (or label). Default: completion, label."] = None
    split: Annotated[str | None, "Split of a dataset folder or hub dataset."] = None
    limit: Annotated[int | None, "Read only the first N examples."] = None
    max_length: Annotated[
        int | None, "Tokens of prompt and answer; longer prompts lose their start. Default: the tokenizer's limit."
    ] = None
    batch_size: Annotated[int, "Examples per forward pass."] = 8


@dataclass(frozen=True)
class SweepSettings:
    """Which boundaries to measure, and how."""

    boundaries: Annotated[
        str | None,
        "Boundaries to measure, such as 0,8,16,24:30 (both ends count), or coarse (coarse to fine). Default: all.",
    ] = None
    stack: Annotated[
        str | None, "Stack the boundary runs through, such as decoder. Default: the only one, or the decoder."
    ] = None
    engine: Annotated[
        Literal["auto", "one-pass", "naive"], "How to measure; auto tries one-pass against naive first."
    ] = "auto"


@dataclass(frozen=True)
class ChoiceSettings:
    """How to choose the boundary."""

    select_by: Annotated[str, "Metric to choose by: loss, token-accuracy, accuracy, bleu, rougeL, exact-match, ..."] = (
        "loss"
    )
    rule: Annotated[
        Literal["best", "one-se", "no-worse", "at-most", "manual"],
        "The boundary with the best value; the smallest within one standard error of the best; the smallest not "
        "significantly worse than the full adapter; the best up to --at-most; or the one given by --boundary.",
    ] = "one-se"
    at_most: Annotated[int | None, "Highest boundary allowed, for --rule at-most."] = None
    boundary: Annotated[int | None, "The boundary, for --rule manual."] = None
    seed: Annotated[int, "Seed of the bootstrap."] = 0


@dataclass(frozen=True)
class GenerationSettings:
    """How to write answers, for metrics of text."""

    max_new_tokens: Annotated[int, "Longest answer to write, in tokens."] = 64
    shortlist: Annotated[
        int, "Of 'lorazor boundary': how many to write answers for when choosing by a text metric."
    ] = 6


@dataclass(frozen=True)
class CurveSettings:
    """Which layers to look into, and how to read a boundary off their curves."""

    stack: Annotated[str | None, "Stack to look into, such as model.layers. Default: the only one, or the decoder."] = (
        None
    )
    settled_within: Annotated[
        float, "The curves have settled where their gap stays within this share of the last one, 0..1."
    ] = 0.1


@dataclass(frozen=True)
class LoraSettings:
    """The LoRA adapter to train."""

    rank: Annotated[int, "Rank r of every site."] = 8
    alpha: Annotated[float, "alpha; a site is scaled by alpha / r."] = 16
    dropout: Annotated[float, "Dropout in front of A, 0..1."] = 0.0
    target_modules: Annotated[str, "Modules to adapt: all-linear, or names separated by commas."] = "all-linear"


@dataclass(frozen=True)
class TrainSettings:
    """How to train."""

    steps: Annotated[int, "Optimizer steps, those of a selection run included."] = 300
    learning_rate: Annotated[float, "Peak learning rate; falls linearly to 0."] = 1e-3
    warmup_steps: Annotated[int, "Steps over which the learning rate rises."] = 10
    weight_decay: Annotated[float, "Weight decay of A and B."] = 0.01
    precision: Annotated[
        Literal["auto", "float32", "bfloat16"], "Arithmetic; auto is bfloat16 on CUDA, else float32."
    ] = "auto"
    gradient_checkpointing: Annotated[bool, "Recompute activations in the backward pass: less memory, more time."] = (
        False
    )
    save_steps: Annotated[int, "Steps from one checkpoint to the next; --resume goes on from the last one."] = 50
    seed: Annotated[int, "Seed of initialisation and data order."] = 0


@dataclass(frozen=True)
class BudgetSettings:
    """How much to keep: one of the three."""

    keep: Annotated[int | None, "Sites to keep."] = None
    keep_fraction: Annotated[float | None, "Share of the sites to keep, 0..1."] = None
    params: Annotated[int | None, "Numbers in A and B that the kept sites may have together."] = None


@dataclass(frozen=True)
class WarmupSettings:
    """How the sites are chosen."""

    select_steps: Annotated[int | None, "Steps of the selection run. Default: a third of --steps."] = None
    score: Annotated[
        str,
        "What sites are ranked by: gate, gate-norm, probe, sensitivity, credit, or a control (random, first-layers, "
        "last-layers, every-other).",
    ] = "gate"
    schedule: Annotated[
        Literal["one-cut", "progressive", "every-step"],
        "When sites are dropped: at the end of the selection run; one by one; or all but K after every step.",
    ] = "one-cut"
    gate_lr: Annotated[float, "Step size of the gates."] = 5.0
    dense_steps: Annotated[int, "Steps at the start in which progressive and every-step drop nothing."] = 10


@dataclass(frozen=True)
class MethodSettings:
    """Which sites to train."""

    method: Annotated[
        Literal["lora", "weightlora", "weightlora+"],
        "lora: every site. weightlora: choose sites in a selection run, then train these. weightlora+: and raise their "
        "rank by what the others free.",
    ] = "lora"
    start: Annotated[
        Literal["warm", "fresh"], "What the chosen sites start from: what the selection run taught them, or nothing."
    ] = "warm"
    selection: Annotated[Path | None, "A selection.json: train its sites, without a selection run."] = None


@dataclass(frozen=True)
class TrackingSettings:
    """Where a training is logged, beside its run folder."""

    report_to: Annotated[
        str, "Trackers of transformers to log to, separated by commas: tensorboard, trackio, wandb, mlflow, ..."
    ] = "none"


@dataclass(frozen=True)
class ScoreSettings:
    """How the sites of a trained adapter are scored."""

    method: Annotated[
        ScoreMethod,
        "credit: the share of the adapter's gain that is owed to the site. taylor: what closing it costs, to first "
        "order. output-norm: size of its output beside the weight's. norm: size of its update. The rest are controls.",
    ] = "credit"
    points: Annotated[int, "Points of the path of credit: forward-backward passes over every example."] = 8
    score_examples: Annotated[int, "Score on so many examples of --data, the first ones."] = 64
    gradient_checkpointing: Annotated[bool, "Recompute activations in the backward pass: less memory, more time."] = (
        False
    )
    seed: Annotated[int, "Seed of whatever is drawn at random."] = 0


@dataclass(frozen=True)
class SubsetBudgetSettings(BudgetSettings):
    """How much stays: one of the five."""

    params_fraction: Annotated[float | None, "Share of the numbers in A and B that may stay, 0..1."] = None
    tolerance: Annotated[
        str | None,
        "A metric: find the smallest selection that is no worse by it than the full adapter ('lorazor subset').",
    ] = None


@dataclass(frozen=True)
class SearchSettings:
    """What is dropped together, and how the search goes on."""

    by: Annotated[
        By,
        "Drop single sites, groups that serving stacks merge (q/k/v, gate/up), projection kinds, layers, or all layers "
        "but a window of neighbours.",
    ] = "site"
    raw: Annotated[bool, "Rank by the score itself; else by score per parameter."] = False
    rounds: Annotated[int, "Score the survivors anew and drop again, so many times in all."] = 1
    verify: Annotated[
        int, "Backward elimination: drop one at a time, of the N of lowest score the one that is missed least. 0: off."
    ] = 0
    ranks: Annotated[
        Literal["keep", "uniform", "mixed"],
        "Also lower ranks: keep only the singular directions that earn most, the same number at every site, or mixed.",
    ] = "keep"
    rule: Annotated[
        ToleranceRule,
        "When --tolerance calls a selection no worse: within one paired standard error of the full adapter, or not "
        "significantly worse at 95 %, which few examples make easy.",
    ] = "one-se"
    baselines: Annotated[bool, "Also measure random, first-layers, last-layers and norm at the size found."] = False
    metric: Annotated[
        str | None, "Metric to compare by. Default: that of --tolerance, else accuracy of labels, else loss."
    ] = None


@dataclass(frozen=True)
class RefitSettings:
    """How the gates of the survivors are learned."""

    refit: Annotated[
        str | None,
        "Training examples to learn the survivors' gates on, which are folded into B; none that was chosen or is "
        "confirmed on. Default: no refit.",
    ] = None
    refit_steps: Annotated[int, "Steps of --batch-size examples."] = 30
    refit_lr: Annotated[float, "Step size of Adam on the gates; falls linearly to 0."] = 0.05


@dataclass(frozen=True)
class SparseSettings:
    """WeightLoRA's update on a trained adapter."""

    sparse: Annotated[
        bool, "Choose by WeightLoRA's update on the --refit examples (A and B stay), in --refit-steps, not by score."
    ] = False
    gate_lr: Annotated[float, "Step size of the gates with --sparse."] = 5.0


@dataclass(frozen=True)
class RunPlace:
    """Where results go."""

    out: Annotated[Path, "New folder for the results."]
    resume: Annotated[bool, "Go on with an interrupted run in --out."] = False


@dataclass(frozen=True)
class ReportSettings:
    """What the page of a run shows, and where it goes."""

    out: Annotated[
        Path | None, "The HTML file. Default: report.html in the run folder, or in this folder for several runs."
    ] = None
    examples: Annotated[int, "Most examples to show of each run, worst first."] = 50
    figures: Annotated[Path | None, "Also write every figure as PNG and SVG into this folder (needs kaleido)."] = None
    force: Annotated[bool, "Replace a file that exists."] = False
    partial: Annotated[bool, "Take runs that have not finished, and show what they have."] = False
    open: Annotated[bool, "Open the page in the browser."] = False
