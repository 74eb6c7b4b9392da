"""An adapter written in the form that a server computes right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lorazor.adapter.folder import CONFIG_FILE, WEIGHTS_FILE, read_adapter
from lorazor.adapter.prune import PruneResult, write_sites
from lorazor.errors import MeasureError
from lorazor.serve.form import Form
from lorazor.serve.gguf import GGUF_FILE, write_gguf
from lorazor.serve.judging import judge
from lorazor.serve.plan import ExportPlan, planned_tensors

SECTION_START = "<!-- lorazor:exported:start -->"
SECTION_END = "<!-- lorazor:exported:end -->"


def write_export(plan: ExportPlan, out: Path, check: Callable[[Path], None]) -> PruneResult:
    """Write a planned adapter; it appears whole, or not at all.

    Args:
        plan: from `plan_export`.
        out: new folder: an ordinary PEFT folder, or, for a server that reads those, a GGUF file in one.
        check: is called with the PEFT folder before it appears; what it raises leaves nothing behind.
    Returns:
        What was written.
    Raises:
        OutputError: `out` is taken, or the disk is full.
        MeasureError: the table of rules says that the server would still compute something else; a bug.
    """
    folder, server = plan.form.folder, plan.server
    changes = {"lora_alpha": plan.alpha}
    if plan.dropped:
        changes |= {"modules_to_save": None, "trainable_token_indices": None}

    def finish(temporary: Path) -> None:
        written = read_adapter(temporary)
        left = judge(Form(written, plan.form.base), server).left_by("gguf")
        if left:
            raise MeasureError(f"What was written for {server.title} it still {left[0].sentence}. Report this.")
        check(temporary)
        if server.is_gguf:
            assert plan.form.base is not None
            write_gguf(written, plan.form.base, temporary / GGUF_FILE)
            for name in (CONFIG_FILE, WEIGHTS_FILE):
                (temporary / name).unlink()

    return write_sites(folder, plan.sites, planned_tensors(plan), out, _section(plan), changes=changes, finish=finish)


def export_size(out: Path) -> int:
    """Bytes of the weights in an exported folder."""
    return next(path for name in (WEIGHTS_FILE, GGUF_FILE) if (path := out / name).exists()).stat().st_size


def _section(plan: ExportPlan) -> str:
    """What was done, for the model card."""
    lines = [SECTION_START, f"## Exported with lorazor for {plan.server.title}", "", *what_was_done(plan), SECTION_END]
    return "\n".join(lines)


def what_was_done(plan: ExportPlan) -> list[str]:
    """What differs from the adapter, in sentences."""
    folder = plan.form.folder
    before, after = ({site.rank for site in sites} for sites in (folder.sites, plan.sites))
    said = []
    if plan.alpha != folder.config.get("lora_alpha") or folder.config.get("use_rslora"):
        said.append(f"The scaling is plain alpha / r, with lora_alpha {plan.alpha:g}.")
    if plan.folded:
        said.append(f"A factor is multiplied into B of {len(plan.folded):,} of {len(plan.sites):,} sites.")
    if plan.energy_lost is not None:
        n_cut = sum(entry.components is not None for entry in plan.entries.values())
        said.append(
            f"{n_cut:,} sites are cut to their largest singular directions: {plan.energy_lost:.2%} of the squared norm "
            "of the updates is lost."
        )
    if before != after and max(after) >= max(before):
        said.append(f"Zeros around A and B make every rank {max(after)}.")
    if plan.filled:
        said.append(
            f"{len(plan.filled):,} sites of zeros are added, which the server needs, and which save nothing there."
        )
    if plan.dropped:
        said.append(f"Left out: {', '.join(plan.dropped)}; the base model's own are computed with.")
    return said or ["Nothing had to be changed."]
