"""What cannot be run is refused before the first cell where a suite shows it, and else noted with a line that helps."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from transformers import BertConfig, BertForSequenceClassification

from lorazor.bench.copies import Copies
from lorazor.bench.reading import read_suite
from lorazor.bench.run import chosen_cells, run_suite
from lorazor.errors import DataError, OutputError, SettingsError
from tests.bench.copies import make_model
from tests.workflow.test_pairs import SIZES, pair_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")
SUITE = """
budgets = [{ params = 0.5 }]
[recipe]
steps = 2
batch_size = 4
[tasks.one]
model = "bert"
data = "d"
metrics = "accuracy"
[methods.shrink]
score = "fisher"
[methods.lora]
"""


@pytest.mark.parametrize(
    ("only", "methods"),
    [
        ("one lora", ["lora"]),
        ("one lora*, shrink seed=0,", ["shrink", "lora", "lora 1e-3, early"]),
        ("'lora 1e-3, early' one", ["lora 1e-3, early"]),
        ("lora?*", ["lora 1e-3, early"]),
        (None, ["shrink", "lora", "lora 1e-3, early"]),
    ],
)
def test_names_with_spaces_stand_in_quotes(only: str | None, methods: list[str], tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(f'{SUITE}[methods."lora 1e-3, early"]\nuses = "lora"\nrecipe = {{ steps = 3 }}\n')
    assert [cell.method for cell in chosen_cells(read_suite(tmp_path / "s.toml"), only)] == methods


@pytest.mark.parametrize(("only", "message"), [("lora 2e-3", "names no cell"), ("'lora", "Close the quotation")])
def test_a_pattern_of_no_cell_is_refused(only: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(SUITE)
    with pytest.raises(SettingsError, match=message):
        chosen_cells(read_suite(tmp_path / "s.toml"), only)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[methods.shrink]", "[methods.shrimk]", "no method 'shrimk'; did you mean 'shrink'?"),
        ("score =", "scor =", "options of shrink: 'scor' is unknown; did you mean 'score'?"),
        ("steps = 2", "step = 2", "'step' is unknown; did you mean 'steps'?"),
        ("steps = 2", "steps = 2.5", "steps=2.5 cannot be used"),
        ("model =", "modle =", "'modle' is unknown; did you mean 'model'?"),
        ("params = 0.5", "param = 0.5", "'param' is unknown; did you mean 'params'?"),
        ("params = 0.5", "params = 2", "Pass a share of LoRA on all sites, above 0, up to 1"),
        ("accuracy", "acuracy", "[tasks.one], metrics: 'acuracy' is unknown; did you mean 'accuracy'?"),
        ('score = "fisher"', 'only = ["on"]', "only: 'on' is unknown; did you mean 'one'?"),
        ('data = "d"', 'data = "d"\nmethods = ["lor"]', "[tasks.one], methods: 'lor' is unknown; did you mean 'lora'?"),
        (
            'data = "d"',
            'data = "d"\nrecipes = { lor = {} }',
            "[tasks.one], recipes: 'lor' is unknown; did you mean 'lora'?",
        ),
        ('data = "d"', 'data = "d"\nrecipes = { lora = { step = 2 } }', "'step' is unknown; did you mean 'steps'?"),
        ('data = "d"', 'data = "d"\nrecipes = 3', "[tasks.one]: recipes = 3. Pass a table."),
        ('data = "d"', 'data = "d"\nmethods = "lora"', "[tasks.one]: methods = 'lora'. Pass a list of names."),
        ('data = "d"', 'data = "d"\nrecipes = { lora = 3 }', "[tasks.one], recipes: lora = 3. Pass a table."),
        ('score = "fisher"', 'only = "one"', "[methods.shrink]: only = 'one'. Pass a list of names."),
        ('score = "fisher"', "recipe = 3", "[methods.shrink]: recipe = 3. Pass a table."),
        ("[recipe]", "[recipes]", "'recipes' is unknown; did you mean 'recipe'?"),
        (
            "[methods.shrink]",
            "[methods]\nbase = 3\n[methods.shrink]",
            "base = 3. Pass a table, such as base = {}.",
        ),
        (
            "[methods.shrink]",
            f"[methods.{'a' * 81}]\nuses = 'base'\n[methods.shrink]",
            "81 characters. Use 1 to 80.",
        ),
        ("[methods.lora]", "[methods.lora]\nuses = 3", "no method 3"),
        ("budgets = [", "seeds = [4294967296]\nbudgets = [", "Pass a list of whole numbers, from 0 to 4294967295."),
        ("[{ params = 0.5 }]", "3", "budgets = 3. Pass a list"),
        ("params = 0.5", "params = true", "Pass a share of LoRA on all sites"),
        ("params = 0.5 }", "params = 0.5 }, { params = 0.5000001 }", "is the same as"),
        ('data = "d"', 'data = "d"\nmethods = [3]', "methods = [3]. Pass a list of names."),
        (
            'score = "fisher"',
            'heal = "no"',
            "seed=0': heal='no' cannot be used. Pass True or False.",
        ),
        ('score = "fisher"', 'score = "fisherr"', "score='fisherr' cannot be used. Pass one of fisher, balanced"),
        ("steps = 2", "steps = 0", "steps=0 must be above 0."),
        ("steps = 2", "learning_rate = -1", "learning_rate=-1 must be above 0."),
        ("steps = 2", "rank = 0", "rank=0 must be above 0."),
        ("steps = 2", 'precision = "float33"', "precision='float33' cannot be used. Pass one of auto"),
        ('data = "d"', 'data = "d"\nn_test = 0', "n_test=0 is too small. Pass 1 or more."),
        ('data = "d"', 'data = "d"\nlabels = "foo"', "labels='foo' cannot be used"),
        ('data = "d"', 'data = "d"\ntest = "train"', "test='train' are the examples to train on. Name another split."),
    ],
)
def test_a_suite_that_cannot_be_run_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in SUITE
    (tmp_path / "s.toml").write_text(SUITE.replace(old, new))
    with pytest.raises(SettingsError) as caught:
        read_suite(tmp_path / "s.toml")
    assert message in str(caught.value)


def test_a_suite_without_a_cell_is_refused_and_a_mark_of_the_byte_order_is_not(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(SUITE.replace("[{ params = 0.5 }]", "[]").replace("[methods.lora]\n", ""))
    with pytest.raises(SettingsError, match="has no cell: no method applies to a task, or none can meet a budget"):
        read_suite(tmp_path / "s.toml")
    (tmp_path / "s.toml").write_text(SUITE, encoding="utf-8-sig")
    assert len(read_suite(tmp_path / "s.toml").cells) == 2


def test_a_split_is_one_readable_file(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    for name in ("test.bak", "test.README.md", "test.part.jsonl", "test.jsonl"):
        (tmp_path / "d" / name).touch()
    assert Copies(tmp_path).data("d", "test") == (str(tmp_path / "d" / "test.jsonl"), None)
    (tmp_path / "d" / "test.csv").touch()
    with pytest.raises(DataError, match=r"has several files for the split 'test': test.(jsonl|csv), test.(csv|jsonl)"):
        Copies(tmp_path).data("d", "test")


def test_a_task_may_name_its_methods_and_a_method_its_tasks(tmp_path: Path) -> None:
    two = SUITE.replace('data = "d"\n', 'data = "d"\nmethods = ["lora"]\n')
    two = two.replace("[methods.shrink]", '[tasks.two]\nmodel = "bert"\ndata = "e"\n[methods.shrink]')
    (tmp_path / "s.toml").write_text(two + '[methods.dora]\nonly = ["one", "two"]\n[methods.rslora]\nonly = ["two"]\n')
    cells = read_suite(tmp_path / "s.toml").cells
    assert [(cell.task, cell.method) for cell in cells] == [
        ("one", "lora"), ("two", "shrink"), ("two", "lora"), ("two", "dora"), ("two", "rslora"),
    ]  # fmt: skip


def test_the_recipe_of_a_method_on_a_task_goes_before_those_of_either(tmp_path: Path) -> None:
    own = 'data = "d"\nrecipe = { steps = 3, rank = 4 }\nrecipes = { lora = { steps = 5 } }'
    (tmp_path / "s.toml").write_text(
        SUITE.replace('data = "d"', own).replace("[methods.lora]", "[methods.lora]\nrecipe = { steps = 4, alpha = 9 }")
    )
    cells = read_suite(tmp_path / "s.toml").cells
    assert [(one.method, one.recipe.steps, one.recipe.rank, one.recipe.alpha) for one in cells] == [
        ("shrink", 3, 4, 16), ("lora", 5, 4, 9),
    ]  # fmt: skip


def test_the_name_of_a_suite_is_looked_for() -> None:
    with pytest.raises(SettingsError, match="did you mean 'smoke'"):
        run_suite("smok", out="nowhere", dry_run=True)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No hub, and nothing that waits for one."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_folders_of_others_are_refused(tmp_path: Path, offline: None) -> None:
    (tmp_path / "s.toml").write_text(SUITE)
    (tmp_path / "other.toml").write_text(SUITE)
    (tmp_path / "c").mkdir()
    out = tmp_path / "out"
    failed = run_suite(tmp_path / "s.toml", out=out, copies=tmp_path / "c", only="lora", teraflops=1.0).failed
    (reason,) = failed.values()
    assert "--copies, and name it d/train.jsonl" in reason
    with pytest.raises(OutputError, match="holds the suite 's', not 'other'"):
        run_suite(tmp_path / "other.toml", out=out)
    (out / "results.jsonl").write_text('{"schema": "lorazor.results/9", "cell": "a"}\n')
    with pytest.raises(OutputError, match="schema 'lorazor.results/9'; this lorazor reads 'lorazor.results/1'"):
        run_suite(tmp_path / "s.toml", out=out)


def test_cells_that_cannot_be_run_say_why_and_the_others_go_on(tmp_path: Path, offline: None) -> None:
    for name, model in (
        ("bert", make_model("bertfor")),
        ("one-output", BertForSequenceClassification(BertConfig(**SIZES, num_labels=1))),
    ):
        pair_tokenizer().save_pretrained(tmp_path / "c" / name)
        model.save_pretrained(tmp_path / "c" / name)
    for data, label_of_test in (("d", 1), ("outside", 5)):
        for split in ("train", "validation", "test"):
            label = label_of_test if split == "test" else 1
            rows = [{"text": f"{split} {n}", "label": n % 2 * label} for n in range(12)]
            file = tmp_path / "c" / data / f"{split}.jsonl"
            file.parent.mkdir(exist_ok=True)
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = {
        "outside": 'model = "bert"\ndata = "outside"',
        "metric": 'model = "bert"\ndata = "d"\nmetrics = "bleu"',
        "data": 'model = "bert"\ndata = "owner/missing:part"',
        "model": 'model = "owner/missing"\ndata = "d"',
        "one-output": 'model = "one-output"\ndata = "d"\nmetrics = "accuracy"',
        "numbers": 'model = "one-output"\ndata = "d"\nlabels = "numbers"',
    }
    text = "".join(f"[tasks.{name}]\n{own}\n" for name, own in tasks.items())
    (tmp_path / "s.toml").write_text(f"[recipe]\nsteps = 2\nbatch_size = 4\n{text}[methods.lora]\n")
    result = run_suite(tmp_path / "s.toml", out=tmp_path / "out", copies=tmp_path / "c", devices="cpu", teraflops=1.0)
    failed = {name.partition(",")[0]: reason for name, reason in result.failed.items()}
    assert "has the label 5, but the head" in failed["outside"]
    assert "metric='bleu' needs answers in text" in failed["metric"]
    assert "--copies, and name it owner/missing/part/train.jsonl" in failed["data"]
    assert "--copies, and name it owner/missing." in failed["model"]
    assert [row["task"] for row in result.rows] == ["one-output", "numbers"]  # whole numbers: classes, unless said
    assert [set(row["metrics"]) for row in result.rows] == [{"loss", "accuracy"}, {"loss"}]
    noted = [json.loads(line) for line in (tmp_path / "out" / "failures.jsonl").read_text().splitlines()]
    assert {one["error"] for one in noted} == set(result.failed.values())
