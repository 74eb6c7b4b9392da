"""A boundary chosen on few validation examples may not hold on test examples: four metrics, three rules, one adapter.

One sweep measures every boundary on the validation examples, answers are written at a shortlist, and each metric and
rule chooses its boundary. Every chosen one, the full adapter and the base model are then measured on test examples. The
table says what each choice drops, how it differs from the full adapter on both (95 % intervals, paired), and whether it
held. All that was measured stays in the run folder, example by example; the same command with --resume goes on after an
interruption.

    python benchmarks/boundary_on_e2e.py --adapter FOLDER [--model FOLDER]
        --validation dev.jsonl.xz --test test.jsonl.xz [--n-validation 128] [--n-test 256] --out RUN [--resume]
"""

from __future__ import annotations

import argparse
import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _machine import record, say

from lorazor.adapter.folder import read_adapter
from lorazor.adapter.load import Loaded, load
from lorazor.adapter.sites import choose_stack, is_kept, stack_sizes
from lorazor.data.examples import Example, read_examples
from lorazor.measure.generation import boundary_gates
from lorazor.measure.metrics import metric_named
from lorazor.measure.stats import Interval, Scores
from lorazor.measure.sweep import Sweep, SweepRow, sweep
from lorazor.runs import RunFolder
from lorazor.select.boundary import Choice, Confirmation, Rule, choose_boundary, confirm_boundary, shortlist
from lorazor.settings import DataSettings, GenerationSettings, ModelSettings
from lorazor.workflow.texts import score_texts, write_answers

METRICS = ("loss", "token-accuracy", "rougeL", "bleu")
TEXT_METRICS = [metric for metric in METRICS if metric_named(metric).needs_text]
RULES: tuple[Rule, ...] = ("best", "one-se", "no-worse")


def main() -> None:
    arguments = _arguments()
    validation = draw(arguments.validation, arguments.n_validation, arguments.seed)
    test = draw(arguments.test, arguments.n_test, arguments.seed)
    check_is_unseen(test, validation)
    read_adapter(arguments.adapter)  # complains before anything is written
    run = start(arguments)
    loaded = load(arguments.adapter, ModelSettings(arguments.model, arguments.gguf_file))
    experiment = Experiment(run, loaded, choose_stack(loaded.sites), arguments)
    choices = experiment.choose(validation)
    run.write_json("choices.json", [choice.to_document() for choice in choices])
    boundaries = sorted({0, experiment.n_layers, *(choice.boundary for choice in choices)})
    say(f"Testing boundaries {', '.join(map(str, boundaries))} on {len(test)} examples.")
    scores = experiment.measure("test", test, boundaries, boundaries)
    confirmations = [confirm(choice, scores[choice.metric], boundaries, arguments.seed) for choice in choices]
    tables = [choices_table(choices, confirmations, experiment), values_table(scores, boundaries, experiment)]
    (run.path / "table.md").write_text("\n\n".join(tables) + "\n", encoding="utf-8")
    say("\n" + "\n\n".join(tables) + "\n")
    run.finish()
    record(describe(choices, confirmations, scores, boundaries, experiment), run.path / "result.json")


def draw(source: str, n_examples: int, seed: int) -> list[Example]:
    """The first so many of a seeded shuffle, in the order of the file."""
    examples = read_examples(source)
    if len(examples) < n_examples:
        raise SystemExit(f"{source} has {len(examples)} examples, not {n_examples}. Ask for fewer.")
    random.Random(seed).shuffle(examples)
    return sorted(examples[:n_examples], key=lambda example: example.index)


def check_is_unseen(test: Sequence[Example], validation: Sequence[Example]) -> None:
    seen = {str(example.prompt) for example in validation}
    n_shared = sum(str(example.prompt) in seen for example in test)
    if n_shared:
        raise SystemExit(f"{n_shared} test prompts are also among the validation prompts. Pass other files.")


def start(arguments: argparse.Namespace) -> RunFolder:
    settings = {name: value for name, value in vars(arguments).items() if name not in ("out", "resume")}
    roles = ("adapter", "validation", "test")
    inputs = {role: Path(getattr(arguments, role)) for role in roles}
    return RunFolder.start(arguments.out, "boundary_on_e2e", settings, inputs, arguments.resume)


@dataclass(frozen=True)
class Experiment:
    """The measuring part."""

    run: RunFolder
    loaded: Loaded
    stack: str
    arguments: argparse.Namespace

    @property
    def n_layers(self) -> int:
        return stack_sizes(self.loaded.sites)[self.stack]

    def choose(self, examples: Sequence[Example]) -> list[Choice]:
        """One choice per metric and rule; metrics of text choose from a shortlist."""
        boundaries = list(range(self.n_layers + 1))
        losses = self.sweep("sweep.jsonl", examples, boundaries).scores("loss")
        listed = shortlist(losses, boundaries, self.arguments.shortlist)
        say(f"Writing answers at boundaries {', '.join(map(str, listed))}.")
        scores = self.measure("", examples, boundaries, listed)
        return [
            choose_boundary(
                scores[metric], listed if metric in TEXT_METRICS else boundaries, rule, seed=self.arguments.seed
            )
            for metric in METRICS
            for rule in RULES
        ]

    def measure(
        self, role: str, examples: Sequence[Example], boundaries: Sequence[int], written: Sequence[int]
    ) -> dict[str, Scores]:
        """Every metric: those of losses at `boundaries`, those of text at `written`."""
        prefix = f"{role}-" if role else ""
        measured = self.sweep(f"{prefix}sweep.jsonl", examples, boundaries)
        texts = self.write(f"{prefix}predictions.jsonl", examples, written)
        return {
            metric: score_texts(metric, texts, written, examples) if metric in TEXT_METRICS else measured.scores(metric)
            for metric in METRICS
        }

    def sweep(self, file: str, examples: Sequence[Example], boundaries: Sequence[int]) -> Sweep:
        return sweep(
            self.loaded,
            examples,
            boundaries,
            stack=self.stack,
            batch_size=self.arguments.batch_size,
            known=[SweepRow(**row) for row in self.run.rows(file)],
            on_rows=lambda rows: self.run.append(file, [dataclasses.asdict(row) for row in rows]),
            on_message=say,
            label=f"measuring {file}",
        )

    def write(self, file: str, examples: Sequence[Example], boundaries: Sequence[int]) -> dict[int, dict[int, str]]:
        gates = boundary_gates(self.loaded.sites, self.stack, boundaries)
        variants = dict(zip(boundaries, gates, strict=True))
        reading = DataSettings(batch_size=self.arguments.batch_size)
        generation = GenerationSettings(max_new_tokens=self.arguments.max_new_tokens)
        return write_answers(
            self.run, file, self.loaded, examples, variants, "boundary", TEXT_METRICS, reading, generation, say
        )

    def dropped_percent(self, boundary: int) -> float:
        """LoRA parameters that a boundary drops, in percent of all."""
        sites = self.loaded.sites
        kept = sum(site.n_parameters for site in sites if is_kept(site, self.stack, boundary))
        return 100 - 100 * kept / sum(site.n_parameters for site in sites)


def confirm(choice: Choice, scores: Scores, boundaries: Sequence[int], seed: int) -> Confirmation:
    """Compare the choice with the full adapter on the test examples."""
    pair = [boundaries.index(choice.boundary), boundaries.index(choice.full)]
    return confirm_boundary(dataclasses.replace(scores, statistics=scores.statistics[pair]), choice, seed)


def choices_table(choices: Sequence[Choice], confirmations: Sequence[Confirmation], experiment: Experiment) -> str:
    n_validation, n_test = choices[0].n_examples, confirmations[0].n_examples
    lines = [
        f"Difference to the full adapter, on {n_validation} validation and {n_test} test examples [95 % interval]:",
        "",
        "| metric | rule | boundary | parameters dropped | validation difference | test difference | held |",
        "|---|---|---|---|---|---|---|",
    ]
    for choice, confirmation in zip(choices, confirmations, strict=True):
        is_full = choice.boundary == choice.full
        outcome = "nothing dropped" if is_full else "yes" if confirmation.held else "no"
        lines.append(
            f"| {choice.metric} | {choice.rule} | {choice.boundary} of {choice.full} "
            f"| {experiment.dropped_percent(choice.boundary):.1f} % | {in_brackets(choice.chosen.difference)} "
            f"| {in_brackets(confirmation.difference)} | {outcome} |"
        )
    return "\n".join(lines)


def values_table(scores: dict[str, Scores], boundaries: Sequence[int], experiment: Experiment) -> str:
    lines = [
        f"On the {scores['loss'].n_examples} test examples (boundary 0 is the base model, the last one is full LoRA):",
        "",
        f"| boundary | parameters dropped | {' | '.join(METRICS)} |",
        f"|---|---|{'---|' * len(METRICS)}",
    ]
    for index, boundary in enumerate(boundaries):
        values = " | ".join(f"{scores[metric].values[index]:.4g}" for metric in METRICS)
        lines.append(f"| {boundary} | {experiment.dropped_percent(boundary):.1f} % | {values} |")
    return "\n".join(lines)


def in_brackets(interval: Interval) -> str:
    return f"{interval.estimate:+.3g} [{interval.low:+.3g}, {interval.high:+.3g}]"


def describe(
    choices: Sequence[Choice],
    confirmations: Sequence[Confirmation],
    scores: dict[str, Scores],
    boundaries: Sequence[int],
    experiment: Experiment,
) -> dict[str, Any]:
    return {
        "n_layers": experiment.n_layers,
        "n_validation": choices[0].n_examples,
        "n_test": confirmations[0].n_examples,
        "choices": [
            {
                "metric": choice.metric,
                "rule": choice.rule,
                "boundary": choice.boundary,
                "parameters_dropped_percent": experiment.dropped_percent(choice.boundary),
                "validation_difference": dataclasses.asdict(choice.chosen.difference),
                "test": confirmation.to_document(),
            }
            for choice, confirmation in zip(choices, confirmations, strict=True)
        ],
        "test_values": [
            {"boundary": boundary} | {metric: float(scores[metric].values[index]) for metric in METRICS}
            for index, boundary in enumerate(boundaries)
        ],
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--adapter", required=True, help="adapter folder")
    parser.add_argument("--model", help="base model: hub id or folder; by default the one the adapter names")
    parser.add_argument("--gguf-file", help="name of the GGUF file inside the --model folder")
    parser.add_argument("--validation", required=True, help="examples to choose on, with references")
    parser.add_argument("--test", required=True, help="examples that take no part in the choice, with references")
    parser.add_argument("--n-validation", type=int, default=128, help="validation examples, drawn at random")
    parser.add_argument("--n-test", type=int, default=256, help="test examples, drawn at random")
    parser.add_argument("--shortlist", type=int, default=6, help="boundaries to write validation answers at")
    parser.add_argument("--batch-size", type=int, default=8, help="examples per forward pass")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="longest answer")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws and of the bootstrap")
    parser.add_argument("--out", type=Path, required=True, help="run folder; the result is in its result.json")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run in --out")
    return parser.parse_args()


if __name__ == "__main__":
    main()
