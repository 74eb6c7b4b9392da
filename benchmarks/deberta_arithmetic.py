"""36 query, key and value sites of DeBERTaV3-base at r = 8 are 442,368 parameters; 10 leave 122,880, 5 leave 61,440.

This is the arithmetic of the WeightLoRA paper, counted by stock PEFT: on all sites, and again on the model after
lorazor's cut and on a fresh model with the `LoraConfig` that the cut left. The model has the shape of DeBERTaV3-base,
but no weights, so nothing is downloaded. Which sites stay does not matter here, because all 36 have the same size; they
are drawn at random.

    python benchmarks/deberta_arithmetic.py [--seed 0]
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from _machine import record
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import DebertaV2Config, DebertaV2Model

from lorazor.adapter.sites import find_sites
from lorazor.select.projection import sites_for_count
from lorazor.select.scores import control_scores
from lorazor.train.disconnect import disconnect_

PUBLISHED = {36: 442_368, 10: 122_880, 5: 61_440}
"""Parameters by the number of sites."""


def main() -> None:
    arguments = _arguments()
    counts = {n_kept: count(n_kept, arguments.seed) for n_kept in PUBLISHED}
    document = {
        "published": PUBLISHED,
        "counted_after_the_cut": {n_kept: cut for n_kept, (cut, _) in counts.items()},
        "counted_in_a_fresh_model": {n_kept: fresh for n_kept, (_, fresh) in counts.items()},
    }
    wrong = [n_kept for n_kept, pair in counts.items() if set(pair) != {PUBLISHED[n_kept]}]
    record(document | {"holds": not wrong}, arguments.out)
    if wrong:
        raise SystemExit(f"The parameters of {', '.join(map(str, wrong))} sites are not those published.")


def count(n_kept: int, seed: int) -> tuple[int, int]:
    """Trainable parameters with so many sites: in place after the cut, and in a fresh model with the config it left."""
    model = on_queries_keys_and_values(LoraConfig(r=8, target_modules=["query_proj", "key_proj", "value_proj"]))
    sites = find_sites(model)
    if n_kept < len(sites):
        disconnect_(model, sites, sites_for_count(control_scores(sites, seed)["random"], n_kept).tolist())
    fresh = on_queries_keys_and_values(copy.deepcopy(model.peft_config["default"]))
    return model.get_nb_trainable_parameters()[0], fresh.get_nb_trainable_parameters()[0]


def on_queries_keys_and_values(config: LoraConfig) -> PeftModel:
    """Stock LoRA on a model of DeBERTaV3-base's shape, whose weights take no memory."""
    shape = DebertaV2Config(
        vocab_size=128100,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=512,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=256,
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        position_biased_input=False,
        type_vocab_size=0,
    )
    with torch.device("meta"):
        return get_peft_model(DebertaV2Model(shape), config)  # pyright: ignore[reportReturnType]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="seed of the sites that stay")
    parser.add_argument("--out", type=Path, help="also write the result to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
