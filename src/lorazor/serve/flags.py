"""What to tell a server so that smaller adapters pay, and the size of a slot that it keeps for each."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from lorazor.errors import SettingsError
from lorazor.serve.base import BaseOutline, group_of
from lorazor.serve.table import VLLM_EMBEDS, Server

_DEFAULT_RANK = 16
"""vLLM's `max_lora_rank`, vllm/config/lora.py:33."""

_PACKED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj"}
_PACKED |= {"up_proj": "gate_up_proj"}


@dataclass(frozen=True)
class Flags:
    """Flags of vLLM for some adapters.

    Attributes:
        max_rank: `--max-lora-rank`: the smallest size that the server has and that holds them.
        targets: `--lora-target-modules`: the modules that they have sites on, by their names in the server; empty
            for a server without this flag.
        slot_bytes: of a slot on a server that is told so; None where the base model is not known.
        slot_bytes_untold: of a slot on a server that is told nothing but a rank it needs.
    """

    max_rank: int
    targets: tuple[str, ...]
    slot_bytes: int | None
    slot_bytes_untold: int | None

    def words(self) -> list[str]:
        """As words of a command line."""
        targets = ["--lora-target-modules", *self.targets] if self.targets else []
        return ["--enable-lora", "--max-lora-rank", str(self.max_rank), *targets]

    def __str__(self) -> str:
        return shlex.join(self.words())


def flags_for(server: Server, names: Iterable[str], rank: int, base: BaseOutline | None) -> Flags | None:
    """The flags of a server for adapters with these sites.

    Args:
        server: whose flags.
        names: all of their sites.
        rank: the largest of their ranks; the server must have room for it.
        base: their base model.
    Returns:
        None for a server that has no flags that lorazor knows.
    """
    if not server.has_flags:
        return None
    names = tuple(names)
    told, untold = size_of_rank(server, rank), max(size_of_rank(server, rank), _DEFAULT_RANK)
    targets = server_names(names, base) if 1 in server.ranks else ()  # older versions wrap every module
    wrapped = in_server(names, base) if targets else None
    return Flags(
        max_rank=told,
        targets=targets,
        slot_bytes=None if base is None else slot_bytes(base, told, wrapped),
        slot_bytes_untold=None if base is None else slot_bytes(base, untold, None),
    )


def size_of_rank(server: Server, rank: int) -> int:
    """The smallest rank of a slot that holds an adapter of a rank.

    Raises:
        SettingsError: there is none.
    """
    size = next((size for size in server.ranks if size >= rank), None)
    if size is None:
        raise SettingsError(
            f"{server.title} has slots up to rank {server.ranks[-1]}, and rank {rank} is above. Cut it."
        )
    return size


def server_names(names: Iterable[str], base: BaseOutline | None = None) -> tuple[str, ...]:
    """Modules by the names that they have in vLLM, which joins q, k and v, and gate and up; each once, in order.

    A name that is none there matches nothing. Modules that a server wraps in every layer anyhow are named by the last
    part of their name alone.

    Args:
        names: full module names in the base model.
        base: the base model; without it, every name is a full one.
    """
    found = tuple(dict.fromkeys(map(_in_vllm, names)))
    if base is None:
        return found
    elsewhere = {
        name.rpartition(".")[2] for name in map(_in_vllm, (*base.linear, *base.embeddings)) if name not in found
    }
    lasts = ((name, name.rpartition(".")[2]) for name in found)
    return tuple(dict.fromkeys(name if last in elsewhere else last for name, last in lasts))


def _in_vllm(name: str) -> str:
    parent, _, last = name.rpartition(".")
    return f"{parent}.{_PACKED[last]}" if last in _PACKED else name


def in_server(names: Collection[str], base: BaseOutline | None) -> set[str]:
    """Modules of the base model that a server wraps when it wraps these: their groups as a whole."""
    wrapped = {one for name in names for one in (group_of(name) or (name,))}
    return wrapped if base is None else {name for name in wrapped if name in base.linear or name in base.embeddings}


def slot_bytes(base: BaseOutline, rank: int, wrapped: Collection[str] | None) -> int:
    """Bytes of a slot: A and B of a rank for every module that is wrapped, whether an adapter has them or not.

    Args:
        base: the base model.
        rank: of the slots.
        wrapped: names of the modules; if left out, all that vLLM wraps: every linear map, and embedding and output
            layer of some models.
    """
    shapes = {**base.embeddings, **base.linear}
    if wrapped is None and base.architecture.removesuffix("ForCausalLM") not in VLLM_EMBEDS:
        wrapped = [name for name in base.linear if name.rpartition(".")[2] != "lm_head"]
    names = shapes if wrapped is None else wrapped
    return base.n_bytes * rank * sum(sum(shapes[name]) for name in names)
