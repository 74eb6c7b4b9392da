"""How to name modules exactly in PEFT's settings, where a name also matches as the end of a longer one."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence


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
    if any(name.endswith(f".{target}") for name in dropped for target in kept):
        return "|".join(re.escape(name) for name in kept)
    return list(kept)


def exact_key(name: str, everything: Collection[str]) -> str:
    """A key of `rank_pattern` or `alpha_pattern` for one module.

    PEFT reads a key as a regular expression behind any prefix, and up to 0.14 as one that has a prefix, or as the whole
    name. So the name itself is for all of them, where no other module could be meant.

    Args:
        name: full name of the module.
        everything: full names of the modules that the key must not match unless they are this one.
    """
    last = name.rpartition(".")[2]
    others = [other for other in everything if other != name and other.endswith(last)]
    is_plain = re.fullmatch(r"[\w.]+", name) is not None
    if is_plain and not any(re.fullmatch(rf"(.*\.)?({name})", other) for other in others):
        return name
    return f"^{re.escape(name)}"
