"""What a server makes of an adapter that was just written for it, and what to tell it."""

from __future__ import annotations

from pathlib import Path

from lorazor.adapter.folder import read_adapter
from lorazor.errors import MeasureError
from lorazor.serve.flags import Flags, flags_for
from lorazor.serve.form import Form
from lorazor.serve.judging import judge
from lorazor.serve.table import Server
from lorazor.settings import ShrinkSettings
from lorazor.workflow.inspect import known_base


def served(path: Path, server: Server, settings: ShrinkSettings) -> Flags | None:
    """The flags for an adapter that was shrunk for a server.

    Args:
        path: the folder.
        server: whom it is for.
        settings: of the run, for the base model.
    Raises:
        MeasureError: the table of rules says that the server would compute something else; a bug.
    """
    folder = read_adapter(path)
    base = known_base(folder, settings.model)
    left = judge(Form(folder, base), server).left_by("gguf")
    if left:
        raise MeasureError(f"{str(path)!r} was shrunk for {server.title}, and it {left[0].sentence}. Report this.")
    return flags_for(server, [site.name for site in folder.sites], max(site.rank for site in folder.sites), base)
