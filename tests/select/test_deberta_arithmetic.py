"""The parameter counts of the WeightLoRA paper, by stock PEFT after the cut. Source: arXiv:2506.02724."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import DebertaV2Config, DebertaV2Model

from lorazor.adapter.sites import find_sites
from lorazor.train.disconnect import disconnect_


def deberta_with_lora() -> PeftModel:
    """LoRA on the queries, keys and values of DeBERTaV3-base's layers, without weights; the embeddings are small."""
    shape = DebertaV2Config(
        vocab_size=64, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    )
    config = LoraConfig(r=8, target_modules=["query_proj", "key_proj", "value_proj"])
    with torch.device("meta"):
        return get_peft_model(DebertaV2Model(shape), config)


@pytest.mark.parametrize(("n_kept", "n_parameters"), [(36, 442_368), (10, 122_880), (5, 61_440)])
def test_the_published_parameter_counts(n_kept, n_parameters):
    model = deberta_with_lora()
    sites = find_sites(model)
    assert len(sites) == 36
    order = torch.randperm(36, generator=torch.Generator().manual_seed(0)).tolist()
    kept = disconnect_(model, sites, [place < n_kept for place in order])
    assert sum(site.n_parameters for site in kept) == n_parameters
    assert model.get_nb_trainable_parameters()[0] == n_parameters
    fresh = deberta_with_lora().unload()
    assert get_peft_model(fresh, model.peft_config["default"]).get_nb_trainable_parameters()[0] == n_parameters
