"""How to name modules exactly in PEFT's settings, where a name also matches as the end of a longer one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from itertools import pairwise


def is_named(module: str, name: str) -> bool:
    """Whether a name in PEFT's settings means a module: it is the end of the module's name."""
    return f".{module}".endswith(f".{name}")


def exact_targets(kept: Sequence[str], everything: Collection[str]) -> list[str] | str:
    """`target_modules` that match the kept modules and no other.

    PEFT matches a name in the list also where it ends a longer name. Where that would bring a dropped module back
    (`encoder.layers.0.fc1` and `text.encoder.layers.0.fc1`), a regular expression for whole names takes its place.

    Args:
        kept: full names of the modules that get LoRA.
        everything: full names of the modules that must not match unless they are kept; may hold the kept ones.
    Returns:
        The names, in the order of `kept`, as a list or as one regular expression.
    """
    dropped = set(everything) - set(kept)
    ends = {".".join(parts[depth:]) for parts in (name.split(".") for name in dropped) for depth in range(len(parts))}
    if not ends.isdisjoint(kept):
        return "|".join(re.escape(name) for name in kept)
    return list(kept)


def exact_keys(names: Collection[str]) -> dict[str, str]:
    """A key of `rank_pattern` or `alpha_pattern` for every module, which matches no other of them.

    PEFT reads a key as a regular expression behind any prefix, and up to 0.14 as one that has a prefix, or as the whole
    name. So the name itself is for all of them, where no other module could be meant. Its dots stand for any character
    there: names are compared with the characters in these places left out, all names of one form at once.

    Args:
        names: full names of the modules.
    Returns:
        By name, in their order.
    """
    forms: dict[tuple[int, ...], list[str]] = {}
    for name in names:
        if re.fullmatch(r"[\w.]+", name):
            forms.setdefault((len(name), *(place for place, one in enumerate(name) if one == ".")), []).append(name)
    plain = set()
    for (length, *dots), own in forms.items():
        ends = (name[-length:] for name in names if len(name) == length or name[-length - 1 : -length] == ".")
        counts = Counter(_without(end, dots) for end in ends)
        plain.update(name for name in own if counts[_without(name, dots)] == 1)
    return {name: name if name in plain else f"^{re.escape(name)}" for name in names}


def _without(name: str, places: Sequence[int]) -> str:
    """A name without the characters in some places, rising."""
    return "\n".join(name[start + 1 : end] for start, end in pairwise([-1, *places, len(name)]))
