"""The settings of `lorazor bench`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from lorazor.fields import MORE, Above, AtLeast, Settings


@dataclass(frozen=True)
class BenchSettings(Settings):
    """Which cells to run, and where."""

    copies: Annotated[
        Path | None,
        "Folder with copies of models and data by their names (Qwen/Qwen3-0.6B, nyu-mll/glue/sst2/train.jsonl), which "
        "take the place of the hub's.",
    ] = None
    only: Annotated[
        str | None, "Cells to run: tasks, methods, budgets and seeds, as in 'sst2 low-* seed=0, rte'. Default: all."
    ] = None
    dry_run: Annotated[bool, "List the cells that are left, and what they cost; run none."] = False
    on: Annotated[
        Literal["here", "devices", "ray"],
        "Where cells run: one after the other in this process; each in a process of its own, as many at a time as "
        "there are --devices; or on a Ray cluster.",
    ] = "here"
    devices: Annotated[str | None, "With --on devices: cuda:0,cuda:1 or cpu,cpu. Default: every GPU, else cpu."] = None
    ray_address: Annotated[str, "With --on ray: the cluster; auto finds that of this machine.", MORE] = "auto"
    gpus: Annotated[float, "With --on ray: GPUs of a cell.", MORE, AtLeast(0)] = 1
    teraflops: Annotated[
        float | None, "What a device does, for times to come. Default: measured here.", MORE, Above(0)
    ] = None
