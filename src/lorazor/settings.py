"""The settings of every command, as frozen dataclasses: `ShrinkSettings` of `lorazor shrink`, and so on.

The command line is generated from them: a field is an option, its annotation holds the help text. Settings that several
commands share are groups inside; the help lists their fields under "more options", but for those that the annotation of
the group names. Values of another type, and numbers that are not finite, are refused when settings are made; what they
mean together is checked where they are used. This file imports nothing heavy, so that `lorazor --help` answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

from lorazor.data_settings import DataSettings, ExampleSettings, GenerationSettings
from lorazor.errors import SettingsError
from lorazor.fields import LARGEST_SEED, MORE, AtLeast, AtMost, Settings

By = Literal["direction", "site", "group", "kind", "layer", "prefix", "window"]
"""What stays or goes together."""

Score = Literal["fisher", "balanced", "credit", "energy", "random", "first-layers", "last-layers"]
"""What the parts of a trained adapter are ranked by."""


@dataclass(frozen=True)
class ModelSettings(Settings):
    """Which base model, and how to load it."""

    model: Annotated[
        str | None, "Base model: hub id or folder. Default: the one the adapter's config names; a training needs it."
    ] = None
    gguf_file: Annotated[str | None, "Name of the GGUF file inside the --model folder."] = None
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        "Number format of the base weights; auto is float32 on CPU, else the format they are stored in.",
    ] = "auto"
    quantization: Annotated[
        Literal["nf4", "fp4", "int8"] | None,
        "Form of the base weights: 4 bits (nf4 as in QLoRA, fp4) or 8, by bitsandbytes. Default: that in which they "
        "are stored.",
    ] = None
    device_map: Annotated[
        str | None, "accelerate's device map, such as auto or cuda:1. Default: cuda if there is one."
    ] = None
    task: Annotated[
        Literal["auto", "causal", "seq2seq", "classification", "question-answering"],
        "What the model does; auto tells it from the base model, the adapter and, in training, the data.",
    ] = "auto"

    def __post_init__(self) -> None:
        """Refuse a form of the base model that cannot be had here.

        Raises:
            SettingsError: see `Settings`; bitsandbytes is not installed; or a file that has a form of its own.
        """
        super().__post_init__()
        if self.quantization and find_spec("bitsandbytes") is None:
            raise SettingsError(
                f"quantization={self.quantization!r} needs bitsandbytes, which is not installed. Run: "
                "pip install 'lorazor[quantized]'"
            )
        if self.quantization and self.gguf_file:
            raise SettingsError(
                f"quantization={self.quantization!r} does not go with a GGUF file, which is in a form of its own. Pass "
                "one of the two."
            )


@dataclass(frozen=True)
class LoraSettings(Settings):
    """The LoRA adapter to train."""

    rank: Annotated[int, "Rank r of every site."] = 8
    alpha: Annotated[float, "alpha; a site is scaled by alpha / r."] = 16
    dropout: Annotated[float, "Dropout in front of A, 0..1."] = 0.0
    target_modules: Annotated[str, "Modules to adapt: all-linear, or names separated by commas."] = "all-linear"

    @property
    def targets(self) -> str | list[str]:
        """As PEFT takes them."""
        names = [name.strip() for name in self.target_modules.split(",")]
        return names[0] if names == ["all-linear"] else names


@dataclass(frozen=True)
class FitSettings(Settings):
    """How a training goes."""

    steps: Annotated[int, "Optimizer steps, those of a selection run included."] = 300
    learning_rate: Annotated[float, "Peak learning rate; falls linearly to 0."] = 1e-3
    rise_steps: Annotated[int, "Steps over which the learning rate rises: the warm-up of other trainers."] = 10
    weight_decay: Annotated[float, "Weight decay of A and B.", AtLeast(0)] = 0.01
    precision: Annotated[
        Literal["auto", "float32", "bfloat16"], "Arithmetic; auto is bfloat16 on CUDA, else float32."
    ] = "auto"
    gradient_checkpointing: Annotated[bool, "Recompute activations in backward passes: less memory, more time."] = False
    accumulation: Annotated[
        int, "Forward passes of a step, of --batch-size / N examples each in a process: less memory, the same steps."
    ] = 1
    save_steps: Annotated[int, "Steps from one checkpoint to the next; --resume goes on from the last one."] = 50
    seed: Annotated[int, "Seed of initialisation and data order.", AtLeast(0), AtMost(LARGEST_SEED)] = 0


@dataclass(frozen=True)
class BudgetSettings(Settings):
    """How much to keep: one of the six."""

    keep: Annotated[int | None, "Sites (or directions, see --by) to keep."] = None
    keep_fraction: Annotated[float | None, "Share of the sites (or directions) to keep, 0..1."] = None
    params: Annotated[int | None, "Numbers in A and B that what is kept may have together."] = None
    params_fraction: Annotated[float | None, "The same as a share of LoRA on all sites, 0..1."] = None
    step_time: Annotated[float | None, "Time of a step, as a share of that of LoRA on all sites, 0..1."] = None
    memory: Annotated[str | None, "Peak of memory, such as 12GB, or as a share of that of LoRA on all sites, 0..1."] = (
        None
    )


@dataclass(frozen=True)
class ChoosingSettings(Settings):
    """How what is trained is chosen."""

    by: Annotated[
        Literal["site", "direction"] | None,
        "Keep sites, or directions of sites: their ranks differ then. Default: sites; of 'train' with a budget of "
        "parameters, directions.",
    ] = None
    select_steps: Annotated[
        int | None,
        "Steps of the selection run. Default: a third of --steps; by direction four fifths; none for a score that "
        "looks at no data.",
    ] = None
    score: Annotated[
        str | None,
        "What sites are ranked by: gate (default; with --step-time last-layers, with --memory random), gate-norm, "
        "probe, sensitivity, loss-change, random, first-layers, last-layers; directions: fisher (default), balanced, "
        "energy, random.",
    ] = None
    schedule: Annotated[
        Literal["one-cut", "progressive", "every-step"],
        "When sites are dropped: at the end of the selection run; one by one; or all but K after every step.",
    ] = "one-cut"
    gate_lr: Annotated[float, "Step size of the gates."] = 5.0
    dense_steps: Annotated[int, "Steps at the start in which progressive and every-step drop nothing."] = 10
    growth: Annotated[
        Literal["served", "paper"],
        "Ranks that grow. served: to one that stacks take (8, 16, 32, ...), also of further sites; paper: r n / K.",
    ] = "served"


@dataclass(frozen=True)
class ShrinkSettings(Settings):
    """How small an adapter is to become, and how."""

    margin: Annotated[
        str | None,
        "How much worse it may be: a share of what the adapter gains in loss, such as 2%, or an amount of a metric, "
        "such as rougeL=0.5. Default: 2%, unless a size is given.",
    ] = None
    params_fraction: Annotated[float | None, "Share of the numbers in A and B that may stay, 0..1."] = None
    params: Annotated[int | None, "Numbers in A and B that may stay."] = None
    size: Annotated[str | None, "Largest size of the weights file, such as 1MB."] = None
    max_rank: Annotated[int | None, "Highest rank that a site may have."] = None
    uniform: Annotated[bool, "One rank for all sites that stay, as some serving stacks want it."] = False
    weights_dtype: Annotated[
        Literal["keep", "bfloat16", "float16", "float32"],
        "Number format of A and B in the file that is written; keep is that of the adapter. Most adapters are stored "
        "in float32, and bfloat16 halves them; what is judged is what is written. (--dtype is the base model's.)",
    ] = "keep"
    energy: Annotated[float | None, "Without data: share of the squared singular values that stays, 0..1."] = None
    heal: Annotated[str | None, "Training examples, to train what stays for a few steps."] = None
    heal_steps: Annotated[int, "Steps of healing, of --batch-size examples.", AtLeast(1)] = 30
    heal_from: Annotated[
        Literal["labels", "full"],
        "What healing learns from: what the full adapter makes of every token of the answers of --heal (distillation), "
        "for which prompts are enough: answers that are missing it writes itself; or the answers alone.",
        MORE,
    ] = "full"
    by: Annotated[
        By,
        "What stays or goes together: directions of the sites (ranks), sites, groups that serving stacks merge (q/k/v, "
        "gate/up), projection kinds, layers, the first layers (the boundary), or a window of layers.",
    ] = "direction"
    score: Annotated[
        Score | None,
        "What directions are ranked by. fisher: how strongly losses of single examples hang on their gates. balanced: "
        "their energy on the data times their effect on the loss. credit: the share of the gain that is owed to them. "
        "energy: singular values, no data. The rest: controls. Default: fisher, credit of units larger than "
        "directions, energy without data.",
        MORE,
    ] = None
    stack: Annotated[str | None, "Stack that --by prefix and window run through, such as decoder.", MORE] = None
    points: Annotated[
        int, "Points of the path of credit: forward-backward passes over every example.", MORE, AtLeast(1)
    ] = 4
    score_examples: Annotated[
        int, "Score on so many examples of --data, in whole batches of every length.", MORE, AtLeast(1)
    ] = 64
    gradient_checkpointing: Annotated[
        bool, "Recompute activations in the backward pass: less memory, more time.", MORE
    ] = False
    heal_accumulation: Annotated[
        int,
        "Forward passes of a step of healing, of --batch-size / N examples each: less memory, the same steps.",
        MORE,
        AtLeast(1),
    ] = 1
    heal_lr: Annotated[float, "Peak learning rate of healing; falls linearly to 0.", MORE] = 2e-4
    precision: Annotated[
        Literal["auto", "float32", "bfloat16"], "Arithmetic of healing; auto is bfloat16 on CUDA, else float32.", MORE
    ] = "auto"
    seed: Annotated[int, "Seed of the bootstrap, of healing and of random.", MORE, AtLeast(0), AtMost(LARGEST_SEED)] = 0
    model: ModelSettings = ModelSettings()
    reading: DataSettings = DataSettings()
    generation: GenerationSettings = GenerationSettings()


@dataclass(frozen=True)
class BoundarySettings(Settings):
    """How to choose the boundary, and which ones to measure."""

    select_by: Annotated[str, "Metric to choose by: loss, accuracy, bleu, rougeL, exact-match, ..."] = "loss"
    rule: Annotated[
        Literal["best", "one-se", "manual"],
        "The boundary with the best value; the smallest within one standard error of the best; or the one given by "
        "--boundary.",
    ] = "one-se"
    margin: Annotated[
        str | None,
        "How much worse it may be on --confirm: a share of what the adapter gains in loss, or an amount of a metric, "
        "such as rougeL=0.5. Default: 2% where --select-by is loss.",
    ] = None
    boundary: Annotated[int | None, "The boundary, for --rule manual."] = None
    boundaries: Annotated[
        str | None, "Boundaries to measure, such as 0,8,16,24:30 (both ends count). Default: all.", MORE
    ] = None
    stack: Annotated[
        str | None, "Stack the boundary runs through, such as decoder. Default: the only one, or the decoder.", MORE
    ] = None
    engine: Annotated[
        Literal["auto", "one-pass", "naive"], "How to measure; auto tries one-pass against naive first.", MORE
    ] = "auto"
    seed: Annotated[int, "Seed of the bootstrap.", MORE, AtLeast(0), AtMost(LARGEST_SEED)] = 0
    model: ModelSettings = ModelSettings()
    reading: DataSettings = DataSettings()
    generation: GenerationSettings = GenerationSettings()


@dataclass(frozen=True)
class CurvesSettings(Settings):
    """Which layers to look into, and how to read a boundary off their curves."""

    stack: Annotated[str | None, "Stack to look into, such as model.layers. Default: the only one, or the decoder."] = (
        None
    )
    settled_within: Annotated[
        float, "The curves have settled where their gap stays within this share of the last one, 0..1."
    ] = 0.1
    model: ModelSettings = ModelSettings()
    reading: DataSettings = DataSettings()


@dataclass(frozen=True)
class EvalSettings(Settings):
    """What adapters are compared by."""

    metrics: Annotated[str, "Metrics, separated by commas: loss, bleu, rougeL, ..."] = "loss"
    base: Annotated[bool, "Also measure the base model without an adapter."] = False
    seed: Annotated[int, "Seed of the bootstrap.", MORE, AtLeast(0), AtMost(LARGEST_SEED)] = 0
    model: Annotated[ModelSettings, "model"] = ModelSettings()
    reading: DataSettings = DataSettings()
    generation: GenerationSettings = GenerationSettings()


_BATCH_SIZE = "Examples of an optimizer step, over all processes."
_REPORT_TO = "Trackers of transformers to log to, separated by commas: tensorboard, trackio, wandb, mlflow, ..."


@dataclass(frozen=True)
class TrainSettings(Settings):
    """Which sites to train, and how."""

    method: Annotated[
        Literal["lora", "weightlora", "weightlora+"],
        "lora: every site. weightlora: choose sites in a selection run, then train these. weightlora+: and raise their "
        "rank by what the others free.",
    ] = "lora"
    selection: Annotated[Path | None, "A selection.json: train its sites, without a selection run."] = None
    start: Annotated[
        Literal["warm", "fresh"],
        "What the chosen sites start from: what the selection run taught them, or nothing.",
        MORE,
    ] = "warm"
    batch_size: Annotated[int, _BATCH_SIZE, MORE] = 8
    report_to: Annotated[str, _REPORT_TO, MORE] = "none"
    budget: Annotated[BudgetSettings, "params_fraction", "params", "keep", "step_time", "memory"] = BudgetSettings()
    choosing: Annotated[ChoosingSettings, "by"] = ChoosingSettings()
    lora: Annotated[LoraSettings, "rank"] = LoraSettings()
    fit: Annotated[FitSettings, "steps"] = FitSettings()
    model: Annotated[ModelSettings, "model"] = ModelSettings()
    reading: ExampleSettings = ExampleSettings()


@dataclass(frozen=True)
class SelectSettings(Settings):
    """How to choose the sites to train."""

    grow: Annotated[bool, "Raise the rank of the chosen sites by what the others free."] = False
    batch_size: Annotated[int, _BATCH_SIZE, MORE] = 8
    report_to: Annotated[str, _REPORT_TO, MORE] = "none"
    budget: Annotated[BudgetSettings, "params_fraction", "params", "keep", "step_time", "memory"] = BudgetSettings()
    choosing: Annotated[ChoosingSettings, "by"] = ChoosingSettings()
    lora: LoraSettings = LoraSettings()
    fit: Annotated[FitSettings, "steps"] = FitSettings()
    model: Annotated[ModelSettings, "model"] = ModelSettings()
    reading: ExampleSettings = ExampleSettings()


@dataclass(frozen=True)
class PruneSettings(Settings):
    """What to keep, where no selection says it."""

    boundary: Annotated[int | None, "Keep the sites of the first N layers."] = None
    stack: Annotated[str | None, "Stack that --boundary cuts, such as decoder."] = None
    drop_outside: Annotated[bool, "With --boundary: also drop LoRA outside the layers (lm_head, embeddings)."] = False
    changed_rows_only: Annotated[bool, "Store embeddings as the rows that differ from the base's, where exact."] = False
    model: Annotated[str | None, "With --changed-rows-only: base model. Default: the adapter's own."] = None
