"""What a server makes of an adapter, by the table of rules."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorazor.errors import SettingsError
from lorazor.serve.form import Form, Names
from lorazor.serve.table import RULES, SERVERS, Cure, Outcome, Rule, Server

_FROM_GOOD_TO_BAD: Sequence[Outcome] = ("right", "unknown", "wrong", "crashes", "refused")
_IN_WORDS = {
    "right": "computes what PEFT computes",
    "unknown": "NOT KNOWN",
    "wrong": "WRONG without a word",
    "crashes": "loads, then CRASHES",
    "refused": "REFUSED",
}


@dataclass(frozen=True)
class Finding:
    """A rule that holds for an adapter.

    Attributes:
        rule: from the table.
        names: the sites or modules that it is about.
    """

    rule: Rule
    names: Names

    @property
    def sentence(self) -> str:
        """What happens, and to how much."""
        first, *others = self.names
        return f"{self.rule.what}: {first}" + (f" and {len(others)} more" if others else "")


@dataclass(frozen=True)
class Judgement:
    """What a server makes of an adapter.

    Attributes:
        server: which one.
        findings: all rules that hold; none where the server computes what PEFT does.
    """

    server: Server
    findings: tuple[Finding, ...]

    @property
    def outcome(self) -> Outcome:
        """The one that is met first: an adapter that is refused is not computed wrong."""
        found = [_FROM_GOOD_TO_BAD.index(one.rule.outcome) for one in self.findings]
        return _FROM_GOOD_TO_BAD[max(found, default=0)]

    @property
    def is_right(self) -> bool:
        """Whether the server computes what PEFT computes."""
        return not self.findings

    def left_by(self, *cures: Cure) -> tuple[Finding, ...]:
        """What these cures do nothing about."""
        return tuple(one for one in self.findings if one.rule.cure not in cures)

    @property
    def cures(self) -> set[Cure]:
        """What export has to do."""
        return {one.rule.cure for one in self.findings if one.rule.cure is not None}

    @property
    def incurable(self) -> tuple[Finding, ...]:
        """What export can do nothing about."""
        return tuple(one for one in self.findings if one.rule.cure is None)

    @property
    def sentence(self) -> str:
        """All that there is to say, for people."""
        if self.is_right:
            return _IN_WORDS["right"]
        return f"{_IN_WORDS[self.outcome]}: it {'; it '.join(one.sentence for one in self.findings)}"

    @property
    def headline(self) -> str:
        """The first of what decides the outcome, and how much more there is to say."""
        if self.is_right:
            return _IN_WORDS["right"]
        first = next(one for one in self.findings if one.rule.outcome == self.outcome)
        n_more = len(self.findings) - 1
        name, version = self.server.name, "" if self.server.key == self.server.name else f"=={self.server.versions[1]}"
        more = f" ({n_more} more: --for {name}{version})" if n_more else ""
        return f"{_IN_WORDS[self.outcome]}: it {first.sentence}{more}"

    def to_document(self) -> dict[str, Any]:
        """As plain JSON data."""
        return {
            "server": self.server.title,
            "outcome": self.outcome,
            "gains": self.server.gains,
            "findings": [
                {"outcome": one.rule.outcome, "what": one.rule.what, "by": one.rule.by, "names": list(one.names)}
                for one in self.findings
            ],
        }


def judge(form: Form, server: Server) -> Judgement:
    """Look up what a server makes of an adapter.

    Args:
        form: of the adapter.
        server: a row of the table.
    """
    ours = [rule for rule in RULES if server.key in rule.servers]
    found = [Finding(rule, getattr(form, rule.form)) for rule in ours]
    return Judgement(server, tuple(one for one in found if one.names))


def judge_all(form: Form) -> list[Judgement]:
    """What every server of the table makes of an adapter."""
    return [judge(form, server) for server in SERVERS]


def server_named(text: str) -> Server:
    """The row of the table for `NAME`, its newest version, or `NAME==VERSION`.

    Args:
        text: as the user has it, `vllm`, `vllm==0.28.1`.
    Raises:
        SettingsError: no such server, or nothing is known of this version.
    """
    name, _, version = text.lower().partition("==")
    rows = [server for server in SERVERS if server.name == name.strip()]
    listed = ", ".join(server.title for server in SERVERS)
    if not rows:
        raise SettingsError(f"Nothing is known of the server {text!r}. Known are: {listed}.")
    if not version.strip():
        return rows[0]
    numbers = _numbers(version)
    found = next((row for row in rows if _is_within(numbers, *row.versions)), None)
    if not numbers or found is None:
        raise SettingsError(f"Nothing is known of {text!r}. Known are: {listed}. Pass a version, or none: {name}.")
    return found


def _is_within(numbers: tuple[int, ...], first: str | None, last: str | None) -> bool:
    """Whether a version is in a range; 0.31.2 is within 0.31."""
    above = first is None or numbers >= _numbers(first)
    return above and (last is None or numbers[: len(_numbers(last))] <= _numbers(last))


def _numbers(version: str) -> tuple[int, ...]:
    """(0, 31, 2) of 0.31.2rc1."""
    match = re.match(r"\s*b?(\d+(?:\.\d+)*)", version)
    return tuple(map(int, match[1].split("."))) if match else ()
