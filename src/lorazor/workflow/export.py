"""An adapter in the form that a server computes right, verified in stock PEFT."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorazor.adapter.folder import AdapterFolder, check_is_finite
from lorazor.adapter.load import Loaded, load
from lorazor.errors import BaseModelError, OutputError, SettingsError
from lorazor.fields import with_fields
from lorazor.files import check_is_free
from lorazor.serve.base import BaseOutline, check_fits, outline_base
from lorazor.serve.export import export_size, what_was_done, write_export
from lorazor.serve.flags import Flags, flags_for
from lorazor.serve.form import Form
from lorazor.serve.gguf import check_can_be_gguf
from lorazor.serve.judging import Judgement, server_named
from lorazor.serve.plan import ExportPlan, plan_export
from lorazor.serve.settings import ExportSettings
from lorazor.serve.verify import Probe, compare, probe
from lorazor.workflow.opening import Adapter, opened


@dataclass(frozen=True)
class ExportResult:
    """What was exported.

    Attributes:
        path: the new folder.
        server: whom it is for, `vllm >= 0.32`.
        before: what the server makes of the adapter as it was.
        said: what was changed, in sentences.
        n_sites: sites that were written.
        n_sites_before: sites of the adapter.
        n_filled: those among the written ones that are new, and zero.
        rank: the largest rank that was written.
        n_bytes: size of the weights.
        n_bytes_before: size of the adapter's weights.
        energy_lost: share of the squared norm of the updates that cutting ranks lost; None where nothing was cut.
        dropped: modules beside LoRA that were left out.
        difference: the largest difference of a logit in stock PEFT to the adapter; None where it was not verified.
        largest_logit: what it is to be compared with; None likewise.
        flags: what to tell the server; None where there is nothing.
    """

    path: Path
    server: str
    before: Judgement
    said: tuple[str, ...]
    n_sites: int
    n_sites_before: int
    n_filled: int
    rank: int
    n_bytes: int
    n_bytes_before: int
    energy_lost: float | None
    dropped: tuple[str, ...]
    difference: float | None
    largest_logit: float | None
    flags: Flags | None

    def to_document(self) -> dict[str, Any]:
        """As plain JSON data."""
        return {**vars(self), "before": self.before.to_document(), "path": str(self.path)}


def export(
    adapter: Adapter, server: str, *, out: str | Path, settings: ExportSettings | None = None, **fields: Any
) -> ExportResult:
    """Write an adapter in the form that a server computes right, and verify it in stock PEFT.

    Args:
        adapter: adapter folder, hub id, or a PEFT model in memory.
        server: `vllm`, or with a version, `vllm==0.28.1`.
        out: new folder.
        settings: what may be lost, and the base model.
        fields: of `ExportSettings`, in place of those of `settings`: `max_rank=1`.
    Raises:
        LorazorError: adapter, server, settings or output folder cannot be used; the server cannot compute the adapter
            in any form; its base model is not to be had, or has no modules for it; or what was written computes
            something else.
    """
    settings, row = with_fields(ExportSettings, settings, fields), server_named(server)
    with opened(adapter) as source:
        folder, place = source.folder, Path(out)
        if place.resolve() == folder.path.resolve():
            raise OutputError(f"The output folder {str(out)!r} is the adapter itself. Choose another folder.")
        check_is_free(place)
        check_is_finite(folder)
        base = _outlined(folder, settings)
        check_fits(folder, base)
        if row.is_gguf:
            check_can_be_gguf(folder, base)
        plan = plan_export(Form(folder, base), row, settings)
        verifier = _Verifier(plan, folder, settings) if settings.verify else None
        written = write_export(plan, place, verifier or (lambda temporary: None))
    rank = max(site.rank for site in plan.sites)
    names = [site.name for site in plan.sites]
    return ExportResult(
        path=place,
        server=row.title,
        before=plan.judgement,
        said=tuple(what_was_done(plan)),
        n_sites=len(plan.sites),
        n_sites_before=len(folder.sites),
        n_filled=len(plan.filled),
        rank=rank,
        n_bytes=export_size(place),
        n_bytes_before=written.n_bytes_before,
        energy_lost=plan.energy_lost,
        dropped=plan.dropped,
        difference=verifier.difference if verifier else None,
        largest_logit=verifier.expected.largest if verifier else None,
        flags=flags_for(row, names, rank, base),
    )


class _Verifier:
    """Compares what was written with the adapter; the adapter is run before anything is written.

    Attributes:
        expected: what the adapter computes.
        difference: the largest difference of a logit, once it was called.
    """

    def __init__(self, plan: ExportPlan, folder: AdapterFolder, settings: ExportSettings) -> None:
        self._plan, self._loaded, self.difference = plan, _loaded(folder, settings), float("nan")
        self.expected: Probe = probe(self._loaded)

    def __call__(self, written: Path) -> None:
        is_same = self._plan.energy_lost is None and not self._plan.dropped
        self.difference, self._loaded = compare(
            self._loaded, written, self.expected, is_same, is_exact=not self._plan.folded
        )


def _outlined(folder: AdapterFolder, settings: ExportSettings) -> BaseOutline:
    try:
        return outline_base(folder, settings.model)
    except (BaseModelError, SettingsError) as error:
        raise type(error)(f"Names and shapes of the base model are needed. {error}") from error


def _loaded(folder: AdapterFolder, settings: ExportSettings) -> Loaded:
    try:
        return load(folder.path, settings.model)
    except BaseModelError as error:
        raise BaseModelError(f"{error} --no-verify exports without comparing logits.") from error
