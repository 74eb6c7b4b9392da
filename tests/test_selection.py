"""Selections with components: checks, the round trip through JSON, and old files."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from lorazor.errors import SelectionError
from lorazor.selection import SelectedSite, Selection
from lorazor.train.recipes import recipe

Q = SelectedSite("layers.0.q", layer=0, stack="layers", kind="q", rank=4, keep=True)
V = SelectedSite("layers.0.v", layer=0, stack="layers", kind="v", rank=2, keep=False, score=0.5)

# What versions without components wrote for these two.
OLD_TEXT = """{
  "format": "lorazor.selection/1",
  "method": "manual",
  "provenance": {},
  "settings": {},
  "sites": [
    {
      "keep": true,
      "kind": "q",
      "layer": 0,
      "name": "layers.0.q",
      "rank": 4,
      "score": null,
      "stack": "layers",
      "weight": 1.0
    },
    {
      "keep": false,
      "kind": "v",
      "layer": 0,
      "name": "layers.0.v",
      "rank": 2,
      "score": 0.5,
      "stack": "layers",
      "weight": 1.0
    }
  ]
}
"""


def test_selections_of_whole_sites_keep_their_bytes_and_old_files_load(tmp_path):
    selection = Selection(sites=(V, Q), method="manual")
    assert selection.to_json() == OLD_TEXT
    (tmp_path / "selection.json").write_text(OLD_TEXT)
    assert Selection.load(tmp_path / "selection.json") == selection


@pytest.mark.parametrize("weights", [None, (0.5, -2.0)])
def test_components_go_through_a_file_as_lists(weights, tmp_path):
    selection = Selection(sites=(replace(Q, components=(0, 3), component_weights=weights), V), method="manual")
    selection.save(tmp_path / "selection.json")
    (entry, other) = json.loads((tmp_path / "selection.json").read_text())["sites"]
    assert entry["components"] == [0, 3] and entry.get("component_weights") == (weights and list(weights))
    assert not other.keys() & {"components", "component_weights"}
    loaded = Selection.load(tmp_path / "selection.json")
    assert loaded == selection and loaded.to_json() == selection.to_json()
    assert [site.kept_rank for site in loaded.sites] == [2, 2]


@pytest.mark.parametrize(
    "components",
    [(), (4,), (-1, 0), (1, 0), (1, 1), (0.0,), (True,), ("0",)],
    ids=["none", "above the rank", "negative", "falling", "twice", "float", "bool", "text"],
)
def test_components_that_the_site_does_not_have_are_refused(components):
    message = r"components=\[.*\] for 'layers.0.q' of rank 4. Pass one or more different whole numbers from 0 to 3"
    with pytest.raises(SelectionError, match=message):
        Selection(sites=(replace(Q, components=components),), method="manual")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"components": (0,), "keep": False}, "components for 'layers.0.q', which is dropped"),
        ({"component_weights": (1.0,)}, "but no components"),
        ({"components": (0, 1), "component_weights": (1.0,)}, "1 component_weights for 2 components"),
        ({"components": (0,), "component_weights": (float("nan"),)}, "hold nan. A weight is a finite number"),
        ({"components": (0,), "component_weights": ("1",)}, "hold '1'"),
    ],
    ids=["dropped", "alone", "too few", "nan", "text"],
)
def test_components_that_contradict_the_rest_are_refused(changes, message):
    with pytest.raises(SelectionError, match=message):
        Selection(sites=(replace(Q, **changes),), method="manual")


def test_components_in_a_file_must_be_a_list():
    document = json.loads(OLD_TEXT)
    document["sites"][0]["components"] = "01"
    with pytest.raises(SelectionError, match=r"sites\[0\]: components='01' must be list or NoneType"):
        Selection.from_document(document)


def test_a_fresh_training_gets_the_rank_that_is_left():
    selection = Selection(sites=(replace(Q, components=(0, 2)), replace(V, keep=True)), method="manual")
    text = recipe(selection, "llama-factory", alpha=16)
    assert "lora_rank: 2\n" in text
