"""A boundary chosen on validation examples is not yet shown to be as good: four metrics, two rules, one adapter.

One meter measures every boundary on the validation examples and writes answers at a shortlist, and each metric and rule
chooses its boundary. Every chosen one is then judged against the full adapter on test examples, with a margin for each
metric: shown, refuted or undecided, one-sided at 95 %. All that was measured stays in the run folder, example by
example; the same command with --resume goes on after an interruption.

    python benchmarks/boundary_on_e2e.py --adapter FOLDER [--model FOLDER]
        --validation dev.jsonl.xz --test test.jsonl.xz [--n-validation 128] [--n-test 256] --out RUN [--resume]
"""

from __future__ import annotations

import argparse
import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _machine import record, say

from lorazor.adapter.folder import read_adapter
from lorazor.adapter.load import load
from lorazor.adapter.parts import Parts
from lorazor.adapter.sites import choose_stack, stack_sizes
from lorazor.data.examples import Example, read_examples
from lorazor.measure.meter import CONFIRM, DATA, Meter, Variant, boundary_gates
from lorazor.measure.metrics import metric_named
from lorazor.runs import RunFolder
from lorazor.select.boundary import BoundaryChoice, Rule, choose_boundary, in_words, shortlist
from lorazor.select.verdict import Margin, Verdict
from lorazor.settings import DataSettings, GenerationSettings, ModelSettings
from lorazor.workflow.reading import start_run
from lorazor.workflow.verdicts import judged

MARGINS = {"loss": "2%", "token-accuracy": "token-accuracy=0.01", "rougeL": "rougeL=1", "bleu": "bleu=1"}
"""How much worse a boundary may be by each metric."""

RULES: tuple[Rule, ...] = ("best", "one-se")


def main() -> None:
    arguments = _arguments()
    validation = draw(arguments.validation, arguments.n_validation, arguments.seed)
    test = draw(arguments.test, arguments.n_test, arguments.seed)
    check_is_unseen(test, validation)
    read_adapter(arguments.adapter)  # complains before anything is written
    experiment = Experiment(arguments, start(arguments), validation, test)
    choices = [choice for metric in MARGINS for choice in experiment.choose(metric)]
    experiment.run.write_json("choices.json", [choice.to_document() for choice in choices])
    say(f"Judging {len({choice.boundary for choice in choices})} boundaries on {len(test)} examples.")
    verdicts = [experiment.judge(choice) for choice in choices]
    table = choices_table(choices, verdicts, experiment)
    (experiment.run.path / "table.md").write_text(table + "\n", encoding="utf-8")
    say(f"\n{table}\n")
    experiment.run.finish()
    record(describe(choices, verdicts, experiment), experiment.run.path / "result.json")


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
    inputs: dict[str, Path | None] = {
        role: Path(getattr(arguments, role)) for role in ("adapter", "validation", "test")
    }
    return start_run(arguments.out, "boundary_on_e2e", settings, inputs, arguments.resume)


class Experiment:
    """The measuring part."""

    def __init__(
        self, arguments: argparse.Namespace, run: RunFolder, validation: Sequence[Example], test: Sequence[Example]
    ) -> None:
        loaded = load(arguments.adapter, ModelSettings(arguments.model, arguments.gguf_file))
        reading = DataSettings(batch_size=arguments.batch_size)
        generation = GenerationSettings(max_new_tokens=arguments.max_new_tokens)
        self.arguments, self.run, self.parts = arguments, run, Parts(tuple(loaded.sites))
        self.meter = Meter(loaded, run, reading, generation, say)
        self.meter.add(DATA, validation)
        self.meter.add(CONFIRM, test, "confirm-")
        self.stack = choose_stack(loaded.sites)
        self.variants = [self.variant(boundary) for boundary in range(stack_sizes(loaded.sites)[self.stack] + 1)]
        self.meter.prefixes(dict(enumerate(self.variants)), DATA, self.stack)

    def variant(self, boundary: int) -> Variant:
        return Variant(f"boundary {boundary}", boundary_gates(self.parts, self.stack, boundary))

    def choose(self, metric: str) -> list[BoundaryChoice]:
        """One choice per rule; metrics of text choose from a shortlist."""
        boundaries = list(range(len(self.variants)))
        if metric_named(metric).needs_text:
            losses = self.meter.scores("loss", self.variants, DATA)
            boundaries = shortlist(losses, boundaries, self.arguments.shortlist)
            say(f"Writing answers at boundaries {', '.join(map(str, boundaries))}.")
        scores = self.meter.scores(metric, [self.variants[boundary] for boundary in boundaries], DATA)
        return [choose_boundary(scores, boundaries, rule, seed=self.arguments.seed) for rule in RULES]

    def judge(self, choice: BoundaryChoice) -> Verdict | None:
        """The chosen boundary against the full adapter on the test examples; None where nothing was dropped."""
        if choice.boundary == choice.full:
            return None
        margin = Margin.parse(MARGINS[choice.metric])
        return judged(self.meter, [self.variants[choice.boundary]], margin, CONFIRM, self.arguments.seed)[0]

    def dropped_percent(self, boundary: int) -> float:
        """LoRA parameters that a boundary drops, in percent of all."""
        kept = self.parts.n_parameters_kept(self.variants[boundary].gates)
        return 100 - 100 * kept / sum(self.parts.n_parameters)


def choices_table(choices: Sequence[BoundaryChoice], verdicts: Sequence[Verdict | None], experiment: Experiment) -> str:
    arguments = experiment.arguments
    lines = [
        f"Difference to the full adapter on {arguments.n_validation} validation examples, and what is lost on "
        f"{arguments.n_test} test examples, one-sided 95 % bounds:",
        "",
        "| metric | rule | boundary | parameters dropped | validation difference | lost on test | margin | verdict |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for choice, verdict in zip(choices, verdicts, strict=True):
        outcome = "nothing dropped | | " if verdict is None else (
            f"{verdict.lost:+.3g} ({verdict.lost_at_least:+.3g} to {verdict.lost_at_most:+.3g}) | {verdict.margin:.3g} "
            f"| {verdict.outcome}"
        )  # fmt: skip
        lines.append(
            f"| {choice.metric} | {choice.rule} | {choice.boundary} of {choice.full} "
            f"| {experiment.dropped_percent(choice.boundary):.1f} % | {in_words(choice.chosen.difference)} "
            f"| {outcome} |"
        )
    return "\n".join(lines)


def describe(
    choices: Sequence[BoundaryChoice], verdicts: Sequence[Verdict | None], experiment: Experiment
) -> dict[str, Any]:
    return {
        "n_layers": len(experiment.variants) - 1,
        "n_validation": experiment.arguments.n_validation,
        "n_test": experiment.arguments.n_test,
        "choices": [
            {
                "metric": choice.metric,
                "rule": choice.rule,
                "boundary": choice.boundary,
                "parameters_dropped_percent": experiment.dropped_percent(choice.boundary),
                "validation_difference": dataclasses.asdict(choice.chosen.difference),
                "test": verdict and verdict.to_document(),
            }
            for choice, verdict in zip(choices, verdicts, strict=True)
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
