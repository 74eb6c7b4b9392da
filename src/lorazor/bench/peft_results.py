"""Rows in the form of PEFT's method_comparison (https://github.com/huggingface/peft, MetaMathQA/utils.py: log_results).

One file a row, `OUT/peft/METHOD--TASK-BUDGET-SEED.json`, which PEFT's `processing.load_df` reads beside its own. What a
suite does not measure is null, or -1 where that reader needs a whole number. `accelerator_memory_max` is `peak_bytes`,
both times are `seconds`, of choosing and training with loading and without the test; the last of `metrics` has every
metric as `test NAME`, and the fraction of right answers, where one is measured, as `test accuracy`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lorazor.bench.suite import Cell
from lorazor.files import json_text, write_text
from lorazor.measure.metrics import METRICS
from lorazor.select.verdict import RIGHT_OR_WRONG

FOLDER = "peft"

_NO_ADAPTER = ("base", "full-finetuning")


def write_peft_results(out: Path, rows: Iterable[Mapping[str, Any]], cells: Iterable[Cell]) -> list[Path]:
    """Write a file for every row, and remove those of rows that are no more: whose names have changed, or their cells.

    Args:
        out: folder of the suite.
        rows: as `measure.suite_rows` describes them.
        cells: of the suite.
    Returns:
        The files.
    """
    by_key, files = {cell.key: cell for cell in cells}, []
    for path in (out / FOLDER).glob("*.json"):
        if _is_ours(path):
            path.unlink()
    for row in rows:
        cell = by_key[row["cell"]]
        ended = out / "cells" / cell.folder / "run.json"
        document = peft_result(row, cell, _time(ended) if ended.exists() else None)
        files.append(out / FOLDER / f"{document['run_info']['experiment_name'].replace('/', '--')}.json")
        write_text(files[-1], json_text(document, indent=2) + "\n")
    return files


def _is_ours(path: Path) -> bool:
    try:
        return "lorazor-version" in json.loads(path.read_bytes())["meta_info"]["package_info"]
    except (ValueError, KeyError, TypeError):
        return False


def peft_result(row: Mapping[str, Any], cell: Cell, created_at: str | None) -> dict[str, Any]:
    """A row as PEFT's benchmark logs it.

    Args:
        row: of the results.
        cell: that it is of.
        created_at: when it was measured, ISO 8601; None where that is not known.
    """
    own, spec, versions = cell.recipe, cell.spec, row["versions"]
    names = ("transformers", "peft", "datasets", "bitsandbytes", "torch")
    packages = {f"{name}-version": versions.get(name) for name in (*names, "lorazor")}
    method, place = (quote(part, safe="=. ") for part in (cell.method, "-".join([cell.task, *cell.parts[2:]])))
    return {
        "run_info": {
            "created_at": created_at,
            "total_time": row["seconds"],
            "experiment_name": f"{method}/{place}",
            "peft_branch": None,
            "train_config": _train_config(cell),
            "peft_config": _peft_config(row, cell),
            "error_msg": "",
        },
        "train_info": {
            "accelerator_memory_reserved_avg": -1,
            "accelerator_memory_max": -1 if row["peak_bytes"] is None else row["peak_bytes"],
            "accelerator_memory_reserved_99th": -1,
            "train_time": row["seconds"],
            "file_size": -1,
            "num_trainable_params": row["n_parameters"],
            "num_total_params": -1 if spec.parameters is None else int(spec.parameters),
            "status": "success",
            "metrics": [
                {
                    "step": row["steps"],
                    **{f"test {name}": value for name, value in row["metrics"].items()},
                    "test accuracy": _accuracy(row["metrics"]),
                    "train loss": None,
                    "train samples": row["steps"] * own.batch_size,
                    "train total tokens": -1,
                }
            ],
        },
        "meta_info": {
            "model_info": {"sha": None, "created_at": None},
            "dataset_info": {spec.data: {"sha": None, "created_at": None}},
            "package_info": packages | {f"{name}-commit-hash": None for name in names},
            "system_info": dict.fromkeys(("system", "release", "version", "machine", "processor"))
            | {"accelerator": row["device"]},
            "pytorch_info": None,
        },
    }


def _train_config(cell: Cell) -> dict[str, Any]:
    """What `TrainConfig` holds, of the Trainer that lorazor uses."""
    own, spec = cell.recipe, cell.spec
    return {
        "model_id": spec.model,
        "dtype": own.dtype,
        "max_seq_length": spec.max_length,
        "batch_size": own.batch_size,
        "batch_size_eval": None,
        "max_steps": own.steps,
        "eval_steps": None,
        "compile": False,
        "use_gc": own.gradient_checkpointing,
        "query_template": None,
        "seed": cell.seed,
        "grad_norm_clip": 1.0,
        "optimizer_type": "AdamW",
        "optimizer_kwargs": {"lr": own.learning_rate, "weight_decay": own.weight_decay},
        "lr_scheduler": "linear",
        "use_amp": {"float32": False, "bfloat16": True}.get(own.precision),
        "autocast_adapter_dtype": True,
        "generation_kwargs": {"max_new_tokens": spec.max_new_tokens},
        "attn_implementation": None,
        "init_kv_cache_prefix": None,
    }


def _peft_config(row: Mapping[str, Any], cell: Cell) -> dict[str, Any] | None:
    """What is known of the adapter, under PEFT's names; the method and its options, which PEFT has no names for."""
    if cell.uses in _NO_ADAPTER:
        return None
    own = cell.recipe
    is_other = row["n_sites"] and not row["ranks"]  # of PEFT, named as there: adalora, loha, lokr, vera
    kind = cell.uses.upper() if is_other else "LORA"
    names = {"peft_type": kind, "base_model_name_or_path": cell.spec.model, "target_modules": own.target_modules}
    rank = max(row["ranks"], default=None)
    if kind == "LORA" and rank is not None:
        alpha = {"lora_alpha": own.alpha * rank / own.rank, "lora_dropout": own.dropout}
        names |= {"r": rank, **alpha, "use_dora": cell.uses == "dora", "use_rslora": cell.uses == "rslora"}
    budget = None if cell.budget is None else dataclasses.asdict(cell.budget)
    return names | {"lorazor": {"method": cell.uses, "options": dict(cell.options), "budget": budget}}


def _accuracy(metrics: Mapping[str, float | None]) -> float | None:
    name = next((name for name in RIGHT_OR_WRONG if metrics.get(name) is not None), None)
    if name is None:
        return None
    value = metrics[name]
    assert value is not None
    return value / 100 if METRICS[name].needs_text else value


def _time(path: Path) -> str:
    return datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(timespec="seconds")
