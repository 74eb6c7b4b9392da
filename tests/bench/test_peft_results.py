"""Rows in PEFT's form have the keys of PEFT's files, and pass what its reader does with them."""

from __future__ import annotations

import json

import pytest

from lorazor.bench.peft_results import write_peft_results
from lorazor.bench.reading import read_suite
from tests.report.made_up_suites import make_row

SUITE = """
seeds = [3]
budgets = [{ params = 0.125 }]
[recipe]
steps = 200
batch_size = 4
rank = 8
alpha = 16
[tasks.maths]
model = "owner/model"
data = "openai/gsm8k"
metrics = "gsm8k-match"
[methods]
base = {}
low-rank = {}
vera = {}
"""

# method_comparison/MetaMathQA/utils.py, log_results, TrainConfig, get_package_info and get_system_info, on 2026-11-29
RUN_INFO = {
    "created_at", "total_time", "experiment_name", "peft_branch", "train_config", "peft_config", "error_msg",
}  # fmt: skip
TRAIN_CONFIG = {
    "model_id", "dtype", "max_seq_length", "batch_size", "batch_size_eval", "max_steps", "eval_steps", "compile",
    "use_gc", "query_template", "seed", "grad_norm_clip", "optimizer_type", "optimizer_kwargs", "lr_scheduler",
    "use_amp", "autocast_adapter_dtype", "generation_kwargs", "attn_implementation", "init_kv_cache_prefix",
}  # fmt: skip
TRAIN_INFO = {
    "accelerator_memory_reserved_avg", "accelerator_memory_max", "accelerator_memory_reserved_99th", "train_time",
    "file_size", "num_trainable_params", "num_total_params", "status", "metrics",
}  # fmt: skip
LAST_METRICS = {"step", "test accuracy", "train loss", "train samples", "train total tokens"}
PACKAGES = {
    f"{name}-{what}"
    for name in ("transformers", "peft", "datasets", "bitsandbytes", "torch")
    for what in ("version", "commit-hash")
}
SYSTEM = {"system", "release", "version", "machine", "processor", "accelerator"}


@pytest.fixture
def documents(tmp_path):
    (tmp_path / "suite.toml").write_text(SUITE)
    cells = read_suite(tmp_path / "suite.toml").cells
    rows = []
    for cell in cells:
        metrics = {"loss": 0.5, "gsm8k-match": 12.5}
        share = cell.budget and cell.budget.share
        rows.append(make_row("maths", cell.method, share, 3, metrics, cell=cell.key, steps=200))
    rows[1] |= {"ranks": [1, 2], "peak_bytes": None}
    rows[2] |= {"ranks": []}
    folder = tmp_path / "cells" / cells[0].folder
    folder.mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    files = write_peft_results(tmp_path, rows, cells)
    assert {file.parent for file in files} == {tmp_path / "peft"}
    return {file.name: json.loads(file.read_text()) for file in files}


def test_the_keys_are_those_of_peft(documents):
    assert set(documents) == {
        "base--maths-seed=3.json", "low-rank--maths-params=0.125-seed=3.json", "vera--maths-seed=3.json",
    }  # fmt: skip
    for document in documents.values():
        assert set(document) == {"run_info", "train_info", "meta_info"}
        assert set(document["run_info"]) == RUN_INFO and set(document["run_info"]["train_config"]) == TRAIN_CONFIG
        assert set(document["train_info"]) == TRAIN_INFO
        (last,) = document["train_info"]["metrics"]
        assert set(last) == LAST_METRICS | {"test loss", "test gsm8k-match"}
        meta = document["meta_info"]
        assert set(meta) == {"model_info", "dataset_info", "package_info", "system_info", "pytorch_info"}
        assert meta["model_info"] == {"sha": None, "created_at": None} == meta["dataset_info"]["openai/gsm8k"]
        assert set(meta["package_info"]) == PACKAGES | {"lorazor-version"} and set(meta["system_info"]) == SYSTEM


def test_the_reader_of_peft_gets_what_was_measured(documents):
    """As `processing.preprocess` and the types of `processing.load_df` have it."""
    document = documents["low-rank--maths-params=0.125-seed=3.json"]
    run, training = document["run_info"], document["train_info"]
    whole = ("accelerator_memory_reserved_avg", "accelerator_memory_max", "accelerator_memory_reserved_99th")
    assert [int(training[name]) for name in (*whole, "file_size")] == [-1, -1, -1, -1]
    assert (round(run["total_time"]), round(training["train_time"]), training["status"]) == (13, 13, "success")
    last = training["metrics"][-1]
    assert last["test accuracy"] == 0.125 and last["test loss"] == 0.5
    assert (int(last["train samples"]), int(last["train total tokens"])) == (800, -1)
    assert run["experiment_name"] == "low-rank/maths-params=0.125-seed=3"
    adapter = run["peft_config"]
    assert (adapter["peft_type"], adapter["r"], adapter["lora_alpha"]) == ("LORA", 2, 4)
    assert adapter["lorazor"]["budget"] == {"kind": "params", "share": 0.125}
    assert documents["vera--maths-seed=3.json"]["run_info"]["peft_config"]["peft_type"] == "VERA"
    base = documents["base--maths-seed=3.json"]
    assert base["run_info"]["peft_config"] is None and base["run_info"]["created_at"] is not None
    assert base["train_info"]["accelerator_memory_max"] == 1_000_000_000 and run["created_at"] is None
