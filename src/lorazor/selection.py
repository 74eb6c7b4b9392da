"""The selection: which LoRA sites stay, as plain data.

This is the waist of lorazor. Every method ends in a `Selection`; pruning, evaluation
and reports start from one. It imports neither torch nor PEFT, and the same selection
always gives the same bytes.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorazor.errors import SelectionError
from lorazor.files import write_text

FORMAT = "lorazor.selection/1"


@dataclasses.dataclass(frozen=True)
class SelectedSite:
    """What a selection says about one site.

    Attributes:
        name: full name in the base model, of the module, `model.layers.0.self_attn.q_proj`, or of the parameter.
        layer: zero-based layer index in its stack; None outside every stack.
        stack: name of the list of layers, `model.layers`; None outside every stack.
        kind: projection kind, `self_attn.q_proj`.
        rank: r, rows of A.
        keep: whether the site stays.
        weight: gate that pruning folds into B; 1.0 leaves the site as trained.
        score: what the method thought of the site, if it scores sites.
        components: zero-based, singular directions of B A that stay, largest first; None keeps the factors as trained.
        component_weights: one per kept component, folded into B beside `weight`; None is 1 for each.
        is_on_parameter: whether the site is a parameter, `model.layers.0.mlp.experts.down_proj`, and no module.
    """

    name: str
    layer: int | None
    stack: str | None
    kind: str
    rank: int
    keep: bool
    weight: float = 1.0
    score: float | None = None
    components: tuple[int, ...] | None = None
    component_weights: tuple[float, ...] | None = None
    is_on_parameter: bool = False

    @property
    def kept_rank(self) -> int:
        """The rank that the site has after pruning, if it stays."""
        return self.rank if self.components is None else len(self.components)


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which sites stay, and how that was decided.

    Attributes:
        sites: one entry per site of the adapter, sorted by name.
        method: what chose them: `boundary`, `weightlora`, `manual`, ...
        settings: the settings of the method.
        provenance: seed, versions, hashes of adapter and data.

    Raises:
        SelectionError: two entries for a site, a weight that is not finite, or components that the site does not have.
    """

    sites: tuple[SelectedSite, ...]
    method: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sites", tuple(sorted(self.sites, key=lambda s: s.name)))
        names = [site.name for site in self.sites]
        if len(set(names)) != len(names):
            twice = next(name for index, name in enumerate(names) if name in names[:index])
            raise SelectionError(f"The selection names {twice!r} twice. Keep one entry per site.")
        for site in self.sites:
            if not math.isfinite(site.weight):
                raise SelectionError(f"weight={site.weight} for {site.name!r}. A weight must be a finite number.")
            _check_components(site)

    @property
    def kept(self) -> tuple[SelectedSite, ...]:
        """The sites that stay."""
        return tuple(site for site in self.sites if site.keep)

    @property
    def dropped(self) -> tuple[SelectedSite, ...]:
        """The sites that go."""
        return tuple(site for site in self.sites if not site.keep)

    def to_json(self) -> str:
        """The selection as JSON text; equal selections give equal bytes."""
        document = {"format": FORMAT, **dataclasses.asdict(self)}
        for site in document["sites"]:
            for key in _OPTIONAL_KEYS:
                if not site[key]:
                    del site[key]
        return json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the selection to a file, whole or not at all."""
        write_text(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Selection:
        """Read a selection file.

        Raises:
            SelectionError: missing file, not JSON, another format, unknown or missing keys, wrong types.
        """
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise SelectionError(f"Cannot read the selection file {str(path)!r}: {error.strerror}.") from error
        except ValueError as error:
            raise SelectionError(f"{str(path)!r} is not a JSON file ({error}). Pass a selection.json.") from error
        return cls.from_document(document, source=str(path))

    @classmethod
    def from_document(cls, document: Any, source: str = "selection") -> Selection:
        """Build a selection from parsed JSON; see `load` for the errors."""
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            found = document.get("format") if isinstance(document, dict) else type(document).__name__
            raise SelectionError(f"{source}: format is {found!r}, but this version of lorazor reads {FORMAT!r}.")
        fields = {key: value for key, value in document.items() if key != "format"}
        _check_keys(fields, cls, source)
        entries = fields["sites"]
        if not isinstance(entries, list):
            raise SelectionError(f"{source}: 'sites' must be a list, not {type(entries).__name__}.")
        sites = tuple(_read_site(entry, f"{source}: sites[{index}]") for index, entry in enumerate(entries))
        return cls(**{**fields, "sites": sites})


_TYPES: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "layer": (int, type(None)),
    "stack": (str, type(None)),
    "kind": (str,),
    "rank": (int,),
    "keep": (bool,),
    "weight": (int, float),
    "score": (int, float, type(None)),
    "components": (list, type(None)),
    "component_weights": (list, type(None)),
    "is_on_parameter": (bool,),
}
# Left out where they say nothing, so that selections of whole modules keep the bytes that they always had.
_OPTIONAL_KEYS = ("components", "component_weights", "is_on_parameter")


def _read_site(entry: Any, where: str) -> SelectedSite:
    if not isinstance(entry, dict):
        raise SelectionError(f"{where} must be an object, not {type(entry).__name__}.")
    _check_keys(entry, SelectedSite, where)
    for key, value in entry.items():
        is_bool_for_number = isinstance(value, bool) and bool not in _TYPES[key]
        if not isinstance(value, _TYPES[key]) or is_bool_for_number:
            allowed = " or ".join(kind.__name__ for kind in _TYPES[key])
            raise SelectionError(f"{where}: {key}={value!r} must be {allowed}.")
    lists = {key: tuple(value) for key, value in entry.items() if isinstance(value, list)}
    return SelectedSite(**{**entry, **lists})


def _check_components(site: SelectedSite) -> None:
    components, weights = site.components, site.component_weights
    if components is None:
        if weights is not None:
            raise SelectionError(f"component_weights for {site.name!r}, but no components. Name the components too.")
        return
    if not site.keep:
        raise SelectionError(f"components for {site.name!r}, which is dropped. Leave them out, or keep the site.")
    is_whole = all(isinstance(index, int) and not isinstance(index, bool) for index in components)
    if not components or not is_whole or list(components) != sorted({i for i in components if 0 <= i < site.rank}):
        raise SelectionError(
            f"components={list(components)} for {site.name!r} of rank {site.rank}. "
            f"Pass one or more different whole numbers from 0 to {site.rank - 1}, in rising order."
        )
    if weights is not None and len(weights) != len(components):
        raise SelectionError(
            f"{len(weights)} component_weights for {len(components)} components of {site.name!r}. Pass one for each."
        )
    for weight in weights or ():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise SelectionError(f"component_weights of {site.name!r} hold {weight!r}. A weight is a finite number.")


def _check_keys(entry: Mapping[str, Any], kind: type, where: str) -> None:
    known = {field.name: field for field in dataclasses.fields(kind)}
    unknown = sorted(set(entry) - set(known))
    if unknown:
        raise SelectionError(f"{where}: unknown key {unknown[0]!r}. Known keys: {', '.join(known)}.")
    nothing = dataclasses.MISSING
    required = {name for name, field in known.items() if field.default is field.default_factory is nothing}
    missing = sorted(required - set(entry))
    if missing:
        raise SelectionError(f"{where}: the key {missing[0]!r} is missing.")
