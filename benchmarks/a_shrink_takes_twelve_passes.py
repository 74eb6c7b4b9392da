"""A shrink by loss takes at most 12 forward passes of its data: 64 examples to choose on, 128 for the verdict.

Counted are the tokens that go through the model, padding left out, in units of the tokens of all examples; a forward
pass whose activations are kept counts three times, as its backward pass is twice its work. Scored by default, not
healed, margin 2 %; by balanced sigma^2 and by credit at its default points beside it. And a search: ten candidates and
the full adapter on the examples to choose on take at most 11.5 passes over these (the base model, which a share of the
gain needs, is one more, once), and not one text goes through the tokenizer twice.

    python benchmarks/a_shrink_takes_twelve_passes.py --adapter ADAPTER --data VALIDATION --confirm TEST
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from _machine import record, say
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from lorazor.adapter.load import load
from lorazor.adapter.parts import Parts
from lorazor.data.examples import Example, read_examples
from lorazor.measure.meter import CONFIRM, DATA, Meter, Variant
from lorazor.runs import RunFolder
from lorazor.settings import DataSettings, GenerationSettings, ModelSettings, ShrinkSettings
from lorazor.workflow.shrink import shrink

N_CANDIDATES = 10
MOST_OF_A_SHRINK, MOST_OF_A_SEARCH = 12.0, 11.5


@dataclasses.dataclass
class Counts:
    """Tokens that went through the model, and calls of the tokenizer.

    Attributes:
        measuring: tokens of passes that keep nothing.
        scoring: tokens of forward passes whose backward pass follows.
        texts: by text, how often the tokenizer was given it.
    """

    measuring: int = 0
    scoring: int = 0
    texts: dict[str, int] = dataclasses.field(default_factory=dict)

    def passes(self, n_tokens: int) -> dict[str, float]:
        """In forward passes over so many tokens."""
        measuring, scoring = self.measuring / n_tokens, 3 * self.scoring / n_tokens
        return {"measuring": measuring, "scoring": scoring, "all": measuring + scoring}


@contextmanager
def counting(tokenizer: Any = None) -> Iterator[Counts]:
    """Count what every model inside the block is given, and the tokenizer."""
    counts = Counts()

    def count(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if getattr(output, "logits", None) is None or not hasattr(module, "get_output_embeddings"):
            return  # not a whole model, but one of its parts
        n_tokens = int(kwargs["attention_mask"].sum())
        if torch.is_grad_enabled() and output.logits.requires_grad:
            counts.scoring += n_tokens
        else:
            counts.measuring += n_tokens

    def counted_call(self: Any, text: Any = None, *args: Any, **kwargs: Any) -> Any:
        for one in [text] if isinstance(text, str) else text:
            counts.texts[str(one)] = counts.texts.get(str(one), 0) + 1
        return call(self, text, *args, **kwargs)

    handle = register_module_forward_hook(count, with_kwargs=True)
    kind: Any = type(tokenizer)
    call = kind.__call__ if tokenizer is not None else None
    try:
        if tokenizer is not None:
            kind.__call__ = counted_call
        yield counts
    finally:
        handle.remove()
        if tokenizer is not None:
            kind.__call__ = call


def search(arguments: argparse.Namespace, examples: Sequence[Example], folder: Path) -> dict[str, Any]:
    """Ten candidates and the full adapter through the meter."""
    loaded = load(arguments.adapter, _model(arguments))
    parts = Parts(tuple(loaded.sites))
    run = RunFolder.start(folder / "search", "search", {}, {}, resume=False)
    with counting(loaded.tokenizer) as counts:
        meter = Meter(loaded, run, DataSettings(), GenerationSettings(), say)
        meter.add(DATA, examples)
        generator = torch.Generator().manual_seed(0)
        for index in range(N_CANDIDATES):
            gates = (torch.rand(len(parts), generator=generator) < (index + 1) / (N_CANDIDATES + 1)).float()
            meter.scores("loss", [Variant(f"candidate {index}", gates), meter.full], DATA)
    n_tokens = _n_tokens(meter)
    return counts.passes(n_tokens) | {"most_calls_per_text": max(counts.texts.values()), "texts": len(counts.texts)}


def whole(arguments: argparse.Namespace, score: Any, n_tokens: int, folder: Path) -> dict[str, Any]:
    """A shrink from start to end."""
    settings = ShrinkSettings(score=score, model=_model(arguments))
    with counting() as counts:
        data, confirm = (str(folder / f"{name}.jsonl") for name in (DATA, CONFIRM))
        found = shrink(arguments.adapter, data, out=folder / score, confirm=confirm, settings=settings, say=say)
    document = json.loads((folder / score / "shrink.json").read_text(encoding="utf-8"))
    return counts.passes(n_tokens) | {"n_candidates": len(document["candidates"]), "reason": found.reason}


def main() -> None:
    arguments = _arguments()
    with tempfile.TemporaryDirectory() as name:
        folder, n_tokens = Path(name), 0
        sources = ((DATA, arguments.data, arguments.n_data), (CONFIRM, arguments.confirm, arguments.n_confirm))
        for what, source, limit in sources:
            lines = Path(source).read_text(encoding="utf-8").splitlines()[:limit]
            (folder / f"{what}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        loaded = load(arguments.adapter, _model(arguments))
        for what in (DATA, CONFIRM):
            run = RunFolder.start(folder / what, what, {}, {}, resume=False)
            meter = Meter(loaded, run, DataSettings(), GenerationSettings(), say)
            meter.add(DATA, read_examples(str(folder / f"{what}.jsonl")))
            n_tokens += _n_tokens(meter)
        del loaded, meter
        found: dict[str, Any] = {"search": search(arguments, read_examples(str(folder / f"{DATA}.jsonl")), folder)}
        found |= {score: whole(arguments, score, n_tokens, folder) for score in ("fisher", "balanced", "credit")}
    holds = found["fisher"]["all"] <= MOST_OF_A_SHRINK and found["search"]["all"] <= MOST_OF_A_SEARCH
    holds &= found["search"]["most_calls_per_text"] == 1
    record({"holds": holds, "n_tokens": n_tokens} | found, arguments.out)
    if not holds:
        raise SystemExit("A shrink, or a search, takes more than it may.")


def _n_tokens(meter: Meter) -> int:
    return sum(int(batch.inputs["attention_mask"].sum()) for batch in meter.batches(DATA))


def _model(arguments: argparse.Namespace) -> ModelSettings:
    return ModelSettings(arguments.model, dtype=arguments.dtype)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--model", help="base model; by default the one that the adapter names")
    parser.add_argument("--data", required=True, help="JSON lines to choose on")
    parser.add_argument("--confirm", required=True, help="JSON lines for the verdict")
    parser.add_argument("--n-data", type=int, default=64)
    parser.add_argument("--n-confirm", type=int, default=128)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, help="also write the result to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
