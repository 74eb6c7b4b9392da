"""What the methods write: which sites, of which ranks, and whether stock PEFT and transformers make the same of it."""

from __future__ import annotations

import ast
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorazor.bench import cell as cells
from lorazor.bench import methods
from lorazor.bench.copies import Copies
from lorazor.bench.experiment import Experiment
from lorazor.bench.reading import find_suite, read_suite
from lorazor.bench.suite import Budget, Cell
from lorazor.errors import LorazorError
from tests.bench.copies import make_copies

pytestmark = pytest.mark.filterwarnings("ignore")
TOKENS = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))


@dataclasses.dataclass
class Ran:
    """A cell that has run, its model at the end of the training, and what it wrote."""

    row: dict[str, Any]
    model: Any
    work: Path
    base: Path


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def run(task: str, method: str, seed: int = 0, options: Any = None, **changes: Any) -> Ran:
        """A cell of the suite smoke, with changes of its budget, of its task's `max_length` and of its recipe."""
        known = read_suite(find_suite("smoke")).cells
        of_task = next(one for one in known if one.task == task)
        own = next(one for one in known if one.method == method)
        spec = dataclasses.replace(of_task.spec, max_length=changes.pop("max_length", of_task.spec.max_length))
        cell: Cell = dataclasses.replace(own, task=task, spec=spec, seed=seed, options=options or {})
        cell = dataclasses.replace(cell, budget=changes.pop("budget", cell.budget))
        cell = dataclasses.replace(cell, recipe=dataclasses.replace(cell.recipe, learning_rate=1e-2, **changes))
        make_copies(tmp_path / "copies", [cell.spec], n_rows=48)
        seen: list[Any] = []
        fit = Experiment._fit
        monkeypatch.setattr(Experiment, "_fit", lambda *all: (seen.append(all[1]), fit(*all))[1])
        monkeypatch.setattr(cells.shutil, "rmtree", lambda *place, **how: None)  # keeps what is written
        row = cells.run_cell(cell, tmp_path / f"out-{seed}", Copies(tmp_path / "copies"), "cpu", print)
        work = tmp_path / f"out-{seed}" / "cells" / cell.folder / "work"
        return Ran(row, seen[-1] if seen else None, work, tmp_path / "copies" / cell.spec.model)

    return run


def names_in(folder: Path) -> set[str]:
    """Sites of the written adapter, without PEFT's frame around their names."""
    keys = load_file(folder / "adapter_model.safetensors")
    ends = {key.removeprefix("base_model.model.").partition(".lora_A")[0] for key in keys if "lora_A" in key}
    return {name.removeprefix("bert.").removeprefix("encoder.") for name in ends}


# 2 layers of width 16 (24 inside), rank 4: q, k, v, o have 128 numbers each, the two of the MLP 160, the pooler 128,
# 1,792 in all, of which a quarter, 448, may stay: three of attention, or less; sites of a layer are in the
# order of their names
ATTENTION = {
    f"layer.{n}.attention.{one}" for n in (0, 1) for one in ("self.query", "self.key", "self.value", "output.dense")
}
MLP = {f"layer.{n}.{one}.dense" for n in (0, 1) for one in ("intermediate", "output")}


@pytest.mark.parametrize(
    ("method", "sites", "rank"),
    [
        ("first-sites", {f"layer.0.attention.{one}" for one in ("output.dense", "self.key", "self.query")}, 4),
        ("last-sites", {"pooler.dense", *(f"layer.1.attention.{one}" for one in ("output.dense", "self.key"))}, 4),
        ("attention-only", ATTENTION, 448 // (8 * 32)),
        ("mlp-only", MLP, 448 // (4 * 40)),
    ],
)
def test_sites_are_the_ones_that_the_method_says(ran: Any, method: str, sites: set[str], rank: int) -> None:
    done = ran("pairs", method)
    assert names_in(done.work / "on-sites") == sites
    assert done.row["ranks"] == [rank]
    assert done.row["n_sites"] == len(sites)
    assert done.row["n_parameters"] <= 448


def test_sites_at_another_rank_are_as_many_as_fit(ran: Any) -> None:
    layer = {one.replace("layer.0", "layer.1") for one in ATTENTION | MLP if "layer.0" in one}
    first = ran("pairs", "first-sites", options={"rank": 2})  # 64 or 80 numbers each: 416, no other fits
    assert names_in(first.work / "on-sites") == {one for one in ATTENTION | MLP if "layer.0" in one}
    last = ran("pairs", "last-sites", options={"rank": 2})  # 400
    assert names_in(last.work / "on-sites") == {"pooler.dense", *layer} - {"layer.1.output.dense"}
    assert first.row["ranks"] == last.row["ranks"] == [2]


def test_random_sites_of_rank_one_on_all_are_a_lower_rank(ran: Any) -> None:
    low, sites = ran("pairs", "low-rank"), ran("pairs", "random-sites", options={"rank": 1})
    assert sites.row["n_parameters"] == low.row["n_parameters"] == 448
    assert sites.row["metrics"] == low.row["metrics"]


def test_directions_start_from_another_rank_and_end_in_the_same_budget(ran: Any) -> None:
    done = ran("pairs", "directions", options={"rank": 2})
    assert max(done.row["ranks"]) <= 2
    assert 448 - 40 < done.row["n_parameters"] <= 448  # a direction of the MLP has 40 numbers
    chosen = json.loads(next((done.work / "directions").rglob("selection.json")).read_text())
    assert {site["rank"] for site in chosen["sites"]} == {2}


@pytest.mark.parametrize("method", ["random-sites", "directions"])
def test_rank_zero_is_refused(ran: Any, method: str) -> None:
    with pytest.raises((ValueError, LorazorError), match="rank|`r`"):
        ran("pairs", method, options={"rank": 0})


def test_random_sites_fit_and_differ_from_seed_to_seed(ran: Any) -> None:
    found = [ran("pairs", "random-sites", seed=seed) for seed in (0, 1)]
    first, second = (names_in(done.work / "on-sites") for done in found)
    assert first != second
    assert all(448 - 160 < done.row["n_parameters"] <= 448 for done in found)  # no other site would fit
    assert (first | second) <= ATTENTION | MLP | {"pooler.dense"}


@pytest.mark.slow
def test_a_budget_of_memory_is_a_share_of_one_cost_for_all_methods(ran: Any) -> None:
    """Texts are cut for all of them alike: `max_length` is less than theirs."""
    changes = {"budget": Budget("memory", 0.9), "max_length": 24}
    costs = [ran("causal", method, **changes).row["cost"] for method in ("last-sites", "random-sites", "weightlora")]
    assert costs[0]["all_sites"] == costs[1]["all_sites"] == costs[2]["all_sites"]
    for cost in costs:
        assert cost["predicted"] <= cost["limit"] == pytest.approx(0.9 * cost["all_sites"])
        assert cost["measured"] == pytest.approx(cost["predicted"], rel=0.1)


def test_adalora_ends_at_the_rank_of_the_budget(ran: Any) -> None:
    done = ran("causal", "adalora", steps=12, rank=4)
    tensors = load_file(done.work / "saved" / "adapter_model.safetensors")
    ranks = {key: len(one) for key, one in tensors.items() if "lora_E" in key}
    assert sum(ranks.values()) == len(ranks) * 4 // 4  # a quarter of rank 4 at every site
    assert len(set(ranks.values())) > 1, "every rank is the same: none has moved"
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(done.base), str(done.work / "saved")).eval()
    with torch.no_grad():
        assert torch.isfinite(stock(TOKENS).logits).all()


@pytest.mark.parametrize("method", ["rslora", "dora", "loha", "lokr", "vera"])
def test_stock_peft_makes_the_same_of_what_is_written(ran: Any, method: str) -> None:
    done = ran("causal", method)
    folder = str(done.work / "saved")
    base = AutoModelForCausalLM.from_pretrained(done.base)
    with torch.no_grad():
        plain = base.eval()(TOKENS).logits
        stock = PeftModel.from_pretrained(base, folder).eval()
        logits, trained = stock(TOKENS).logits, done.model.eval()(TOKENS).logits
    torch.testing.assert_close(logits, trained, rtol=1e-4, atol=1e-5)
    assert (logits - plain).abs().max() > 1e-4, "nothing was trained"
    config = PeftConfig.from_pretrained(folder)
    config.inference_mode = False
    fresh = get_peft_model(AutoModelForCausalLM.from_pretrained(done.base), config)
    assert done.row["n_parameters"] == fresh.get_nb_trainable_parameters()[0]


def test_full_finetuning_changes_weights_and_is_measured_right(ran: Any) -> None:
    done = ran("causal", "full-finetuning")
    before, after = load_file(done.base / "model.safetensors"), load_file(done.work / "saved" / "model.safetensors")
    changed = [name for name in before if not torch.equal(before[name], after[name].to(before[name].dtype))]
    assert len(changed) == len(before)
    model = AutoModelForCausalLM.from_pretrained(done.work / "saved").eval()
    tokenizer = AutoTokenizer.from_pretrained(done.base)
    experiment, test = cells._experiment(_of(done), done.work / "again", done.work, Copies(done.base.parents[1]), "cpu")
    nats, n_tokens = 0.0, 0
    for one in test:
        asked, answer = (
            tokenizer(text, add_special_tokens=False)["input_ids"] for text in (one.prompt, one.completion)
        )
        answer = [*answer, tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([asked + answer])).logits[0, len(asked) - 1 : -1]
        nats += float(torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum"))
        n_tokens += len(answer)
    assert done.row["metrics"]["loss"] == pytest.approx(nats / n_tokens, rel=1e-4)


def test_full_finetuning_takes_steps_that_bfloat16_cannot(ran: Any) -> None:
    done = ran("causal", "full-finetuning", dtype="bfloat16", precision="bfloat16")
    after = load_file(done.work / "saved" / "model.safetensors")
    assert all(not torch.equal(weight, weight.bfloat16().float()) for weight in after.values())


def _of(done: Ran) -> Cell:
    return next(
        one for one in read_suite(find_suite("smoke")).cells if (one.task, one.method) == ("causal", "full-finetuning")
    )


def test_every_method_is_a_short_file_that_says_what_it_is() -> None:
    for path in Path(methods.__file__).parent.glob("[!_]*.py"):
        source = path.read_text()
        assert len(source.splitlines()) <= 50, path.name
        assert (ast.get_docstring(ast.parse(source)) or "").endswith("."), path.name
        assert "BUDGETS = (" in source, path.name


def test_a_new_file_is_a_new_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "only_query.py").write_text(
        '"""LoRA on queries."""\nBUDGETS = ("params",)\n\n\ndef train(experiment, *, power=1):\n    return None\n'
    )
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    suite = tmp_path / "own.toml"
    suite.write_text(
        'budgets = [{ params = 0.5 }]\n[tasks.one]\nmodel = "m"\ndata = "d"\n[methods.only-query]\npower = 2\n'
    )
    (cell,) = read_suite(suite).cells
    assert (cell.uses, dict(cell.options)) == ("only-query", {"power": 2})
