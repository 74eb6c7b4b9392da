"""Units of a hand-made table of sites: what goes together, what stays, and what it all adds up to."""

from __future__ import annotations

import numpy as np
import pytest

from lorazor.adapter.parts import Parts
from lorazor.adapter.sites import Site
from lorazor.errors import AdapterError, MeasureError, SettingsError
from lorazor.select.search import Units


def site(name: str, stack: str | None = None, layer: int | None = None, rank: int = 2, **more) -> Site:
    kind = name if layer is None else name.split(f".{layer}.")[1]
    return Site(name, stack, layer, kind, rank, 1.0, rank * 10, **more)


def layer_of(number: int, stack: str = "model.layers") -> list[Site]:
    names = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj")
    return [site(f"{stack}.{number}.{name}", stack, number) for name in names]


DECODER = Parts((*layer_of(0), *layer_of(1), site("model.embed_tokens", rank=3, has_directions=False), site("lm_head")))
BOTH = Parts(
    (
        site("decoder.block.0.attn.q", "decoder.block", 0),
        site("decoder.block.10.attn.q", "decoder.block", 10),
        site("decoder.block.2.attn.q", "decoder.block", 2),
        site("encoder.block.0.attn.q", "encoder.block", 0),
        site("shared", has_directions=False),
    )
)


def labels(by: str, parts: Parts = DECODER) -> dict[str, int]:
    """Sites of each unit, by its label."""
    units = Units.of(parts, by).movable  # type: ignore[arg-type]
    return {unit.label: len({parts.site_of[part] for part in unit.parts}) for unit in units}


def test_sites_kinds_layers_and_groups():
    outside = {"model.embed_tokens": 1, "lm_head": 1}
    assert labels("site") == dict.fromkeys([one.name for one in DECODER.sites], 1)
    assert labels("kind") == {
        "self_attn.q_proj": 2, "self_attn.v_proj": 2, "self_attn.o_proj": 2, "mlp.gate_proj": 2, "mlp.up_proj": 2,
    } | outside  # fmt: skip
    assert labels("layer") == {"model.layers.0": 5, "model.layers.1": 5} | outside
    blocks = {"self_attn.q/k/v": 2, "self_attn.o_proj": 1, "mlp.gate/up": 2}
    expected = {f"model.layers.{layer}.{name}": size for layer in (0, 1) for name, size in blocks.items()}
    assert labels("group") == expected | outside


def test_every_direction_is_a_unit_and_what_cannot_be_taken_apart_is_one():
    units = Units.of(DECODER, "direction").movable
    assert [unit.parts for unit in units] == [(part,) for part in range(10 * 2 + 1 + 2)]
    assert [unit.n_parameters for unit in units[18:]] == [10, 10, 30, 10, 10]
    assert [unit.label for unit in units[19:22]] == ["model.layers.1.mlp.up_proj", "model.embed_tokens", "lm_head"]


@pytest.mark.parametrize("by", ["prefix", "window"])
def test_layers_in_a_row_leave_all_else_where_it_is(by):
    units = Units.of(BOTH, by)  # of an encoder-decoder, the decoder
    assert [unit.label for unit in units.movable] == [f"decoder.block.{layer}" for layer in (0, 2, 10)]
    assert [unit.parts for unit in units.movable] == [(0, 1), (4, 5), (2, 3)]
    assert (units.fixed, units.n_fixed_parameters) == ((6, 7, 8), 40)
    assert units.parts_of([2]) == [2, 3, 6, 7, 8] and units.parts_of([]) == [6, 7, 8]
    encoder = Units.of(BOTH, by, "encoder")
    assert [unit.parts for unit in encoder.movable] == [(6, 7)] and encoder.fixed == (0, 1, 2, 3, 4, 5, 8)


def test_layers_of_two_stacks_are_different_units():
    assert labels("layer", BOTH) == dict.fromkeys(
        ["decoder.block.0", "decoder.block.10", "decoder.block.2", "encoder.block.0", "shared"], 1
    )


@pytest.mark.parametrize("by", ["direction", "site", "group", "kind", "layer", "prefix", "window"])
@pytest.mark.parametrize("parts", [DECODER, BOTH])
def test_every_part_is_in_one_place_and_scores_and_sizes_add_up(parts, by):
    units = Units.of(parts, by)
    everything = [*units.fixed, *(part for unit in units.movable for part in unit.parts)]
    assert sorted(everything) == list(range(len(parts)))
    assert sum(unit.n_parameters for unit in units.movable) + units.n_fixed_parameters == sum(parts.n_parameters)
    values = np.random.default_rng(0).normal(size=len(parts))
    for unit, score in zip(units.movable, units.scores(values), strict=True):
        assert score == pytest.approx(sum(values[part] for part in unit.parts))
    sizes = [unit.n_parameters for unit in units.movable]
    assert units.smallest == units.n_fixed_parameters + (0 if by == "prefix" and units.fixed else min(sizes))


@pytest.mark.parametrize(
    ("names", "n_units"),
    [
        (["query", "key", "value"], 1),
        (["q_lin", "k_lin", "v_lin"], 1),
        (["q", "k", "v"], 1),
        (["query_proj", "key_proj"], 1),
        (["wi_0", "wi_1"], 1),
        (["c_attn", "c_proj"], 2),
        (["qkv", "key_value"], 2),
    ],
)
def test_groups_of_other_families(names, n_units):
    sites = [site(f"h.0.attn.{name}", "h", 0) for name in [*names, "dense"]]
    assert len(Units.of(Parts(tuple(sites)), "group").movable) == n_units + 1


def test_what_cannot_be_is_refused():
    with pytest.raises(SettingsError, match="by='head' is unknown. Pass one of direction, site, group"):
        Units.of(DECODER, "head")  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="stack='decoder' belongs to --by prefix"):
        Units.of(BOTH, "layer", "decoder")
    with pytest.raises(AdapterError, match="stack='middle'"):
        Units.of(BOTH, "prefix", "middle")
    with pytest.raises(AdapterError, match="no LoRA site in a stack"):
        Units.of(Parts((site("lm_head"),)), "window")
    for broken in (float("nan"), float("inf")):
        with pytest.raises(MeasureError, match=f"score of part 3 is {broken}"):
            Units.of(DECODER, "kind").scores([0.0] * 3 + [broken] + [0.0] * (len(DECODER) - 4))
