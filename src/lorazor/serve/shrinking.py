"""What `shrink --for SERVER` may choose among: forms that the server computes right as they are, and that pay there."""

from __future__ import annotations

import dataclasses

from lorazor.errors import SettingsError, UnsupportedAdapterError
from lorazor.serve.form import Form
from lorazor.serve.judging import judge
from lorazor.serve.table import RULES, Server
from lorazor.settings import ShrinkSettings


def settings_for(server: Server, form: Form, settings: ShrinkSettings) -> ShrinkSettings:
    """The settings of a shrink whose result a server computes right, without a zero added.

    Directions, the default, are replaced by the units that pay there, unless a rank is asked for; and that rank is one
    for all sites where the server has one.

    Args:
        server: a row of the table.
        form: of the adapter that is to be shrunk.
        settings: as the user has them.
    Raises:
        UnsupportedAdapterError: the server computes no adapter right that is made of this one by leaving something out.
        SettingsError: the settings ask for what it does not compute right.
    """
    check_is_right_when_whole(server, form, settings.max_rank is not None)
    if settings.max_rank is not None:
        _check_rank(server, settings.max_rank)
        return dataclasses.replace(settings, uniform=settings.uniform or _has_one_rank(server))
    if not server.units or settings.by in server.units:
        return settings
    if settings.by == "direction":
        return dataclasses.replace(settings, by=server.units[0])
    raise SettingsError(
        f"by={settings.by!r} leaves adapters that {server.title} does not compute right as they are. Pass --by "
        f"{', '.join(server.units)} or none, or leave --for out, and 'lorazor export --for {server.name}' after it."
    )


def check_is_right_when_whole(server: Server, form: Form, has_rank: bool) -> None:
    """Refuse an adapter with something that leaving parts out does not cure: all but what any written adapter loses.

    What is written has alpha / r alone and names in a list, and one rank where one is asked for; a GGUF file is made of
    it by export.

    Args:
        server: a row of the table.
        form: of the adapter that is to be shrunk.
        has_rank: whether a rank is asked for.
    Raises:
        UnsupportedAdapterError: it has.
    """
    judgement = judge(form, server)
    left = judgement.left_by("plain", "gguf", "one rank") if has_rank else judgement.left_by("plain", "gguf")
    if not left:
        return
    if left[0].rule.cure is None:
        advice = "No form of it is: see 'lorazor inspect'."
    else:
        advice = f"Shrink what 'lorazor export --for {server.name}' makes of it."
    raise UnsupportedAdapterError(
        f"{form.folder.name!r} is not computed right by {server.title}, whatever is left out: it "
        f"{left[0].sentence}. {advice}"
    )


def _check_rank(server: Server, rank: int) -> None:
    if server.rank_steps and rank != 8 and rank % 16:
        raise SettingsError(
            f"max_rank={rank}, but {server.title} has ranks of 8 and multiples of 16. Pass one of these, or none."
        )
    if server.ranks and rank not in server.ranks:
        listed = ", ".join(map(str, server.ranks))
        raise SettingsError(
            f"max_rank={rank} saves nothing in {server.title}, which has slots of {listed}. Pass one of these, or none."
        )


def _has_one_rank(server: Server) -> bool:
    return any(rule.form == "own_rank" and server.key in rule.servers for rule in RULES)


def what_is_chosen_among(settings: ShrinkSettings) -> str:
    """The forms that these settings leave, in words."""
    if settings.max_rank is None:
        return f"what stays or goes together is a {settings.by}"
    return f"rank {settings.max_rank}{' at every site' if settings.uniform else ' at most'}"
