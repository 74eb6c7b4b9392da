"""Disconnecting: nothing is left of a removed site, nothing changes that the model computes, growth joins in."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import TrainerCallback

from lorazor.adapter.sites import find_sites, site_parameters
from lorazor.errors import AdapterError, BudgetError
from lorazor.train.callback import WeightLora
from lorazor.train.disconnect import disconnect_, grow_, shapes_of
from lorazor.train.optimizers import forget_parameters_
from tests.tiny_models import FAMILIES, tiny_inputs, tiny_model, tiny_peft_model
from tests.train.tiny_training import N_LAYERS, N_SITES, Watch, logits_of, make_trainer, tiny_llama

WARMUP = 3


def as_published(survivors, n_sites):
    """floor(r n / K) of each, as far as its map allows."""
    return [min(shape.rank * n_sites // len(survivors), shape.limit) for shape in shapes_of(survivors)]


def leaves_of(model):
    """Ids of all tensors that a backward pass from the loss would reach."""
    loss = model(**tiny_inputs("llama")).logits.sum()
    reached, seen, open_nodes = set(), set(), [loss.grad_fn]
    while open_nodes:
        node = open_nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            reached.add(id(node.variable))
        open_nodes += [following for following, _ in node.next_functions]
    return reached


class OptimizerRecord(TrainerCallback):
    """The optimizer and learning rates of each step, and what the optimizer holds after it."""

    def __init__(self):
        self.optimizer, self.held, self.rates = None, [], []

    def on_step_end(self, args, state, control, model, optimizer, lr_scheduler, **kwargs):
        self.optimizer = optimizer
        self.rates.append(lr_scheduler.get_last_lr())
        inner = optimizer.optimizer  # accelerate's wrapper holds torch's own
        self.held.append(
            (
                [id(p) for group in inner.param_groups for p in group["params"]],
                [id(p) for p in inner.state],
                [len(group["params"]) for group in optimizer.param_groups],
            )
        )


@pytest.mark.parametrize("grow", [None, "paper"])
def test_after_the_cut_nothing_of_a_removed_site_is_left(tmp_path, grow):
    model = tiny_llama()
    gone = {name: weakref.ref(parameter) for name, parameter in model.named_parameters() if ".lora_" in name}
    before = Watch({"on_optimizer_step": logits_of})
    after, record = Watch({"on_step_end": logits_of}), OptimizerRecord()
    callback = WeightLora(4, WARMUP, "every-step", gate_lr=30.0, dense_steps=1, grow=grow)
    trainer = make_trainer(tmp_path, model, callback, before, after, record, steps=WARMUP + 3)
    trainer.train()
    torch.testing.assert_close(after.seen[WARMUP - 1], before.seen[WARMUP - 1], atol=1e-5, rtol=0)
    assert (after.seen[-1] - after.seen[WARMUP - 1]).abs().max() > 1e-4  # the survivors train on
    kept = [site.name for site in callback.selection.kept]
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert sorted(trained) == sorted(
        f"base_model.model.{name}.lora_{part}.default.weight" for name in kept for part in "AB"
    )
    assert all(parameter.requires_grad == (".lora_" in name) for name, parameter in model.named_parameters())
    ids = {id(parameter) for parameter in trained.values()}
    for step, (params, states, sizes) in enumerate(record.held, 1):
        n_trained = 2 * (N_SITES if step < WARMUP else 4)
        assert len(params) == sizes[0] == n_trained and sizes[1] == 0
        assert set(states) <= set(params) and len(states) == n_trained
    assert set(record.held[-1][0]) == ids
    assert leaves_of(model) == ids
    rates = [5e-3 * (1 - step / 6) for step in range(1, 7)]
    torch.testing.assert_close(torch.tensor(record.rates), torch.tensor([[r, r] for r in rates]))
    gc.collect()
    alive = {name for name, reference in gone.items() if reference() is not None}
    assert alive == (set() if grow else set(trained))
    names = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert names == {f"base_model.model.{name}" for name in kept}
    assert {type(site.module.scaling["default"]) for site in find_sites(model)} == {float}


class MomentRecord(TrainerCallback):
    """Adam's moments of every B after each step, before and after the cut."""

    def __init__(self):
        self.before, self.after = {}, {}

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.before = self.moments(**kwargs)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == WARMUP:
            self.after = self.moments(**kwargs)

    def moments(self, model, optimizer, **_):
        names = {parameter: name for name, parameter in model.named_parameters() if ".lora_" in name}
        return {
            names[parameter]: (state["exp_avg"].clone(), state["exp_avg_sq"].clone())
            for parameter, state in optimizer.state.items()
            if parameter in names
        }


def test_the_optimizers_moments_follow_the_folded_gates(tmp_path):
    record, gates = MomentRecord(), []
    callback = WeightLora(10, WARMUP, gate_lr=150.0, dense_steps=1)
    note = Watch(
        {
            "on_optimizer_step": lambda _: gates.append(
                callback._evidence and callback._evidence.gated.gates.values.tolist()
            )
        }
    )
    model = tiny_llama()
    names = [site.name for site in find_sites(model)]
    make_trainer(tmp_path, model, callback, record, note, steps=WARMUP, logging_strategy="no").train()
    final = dict(zip(names, gates[WARMUP - 1], strict=True))
    assert len(record.after) == 20 and min(final.values()) < 0
    for name, (first, second) in record.after.items():
        factor = final[name.split(".model.", 1)[1].rsplit(".lora_", 1)[0]] if "lora_B" in name else 1.0
        torch.testing.assert_close(first, record.before[name][0] / factor)
        torch.testing.assert_close(second, record.before[name][1] / factor**2)


def test_with_growth_the_survivors_share_the_rank_and_the_new_part_learns(tmp_path):
    model = tiny_llama(rank=2)
    callback = WeightLora(4, WARMUP, dense_steps=1, grow="paper", seed=3)
    steps = Watch({"on_step_end": lambda m: {n: p.detach().clone() for n, p in m.named_parameters() if "lora_" in n}})
    trainer = make_trainer(tmp_path, model, callback, steps, steps=WARMUP + 2)
    trainer.train()
    assert callback.selection.method == "weightlora+"
    assert {site.rank for site in callback.selection.kept} == {2 * N_SITES // 4} == {7}
    at_cut, at_end = steps.seen[WARMUP - 1], steps.seen[-1]
    for name, tensor in at_cut.items():
        if "lora_B" in name:
            assert not tensor[:, 2:].any() and tensor[:, :2].any()
            moved = (at_end[name] - tensor).abs()
            # within a small factor of the learning rate per step, new columns like old ones
            assert 0 < moved[:, 2:].mean() < 3 * 2 * 5e-3
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.rank_pattern, config.alpha_pattern) == (7, 14, {}, {})
    trainer.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(tiny_model("llama", N_LAYERS), tmp_path / "saved")
    torch.testing.assert_close(logits_of(loaded), logits_of(model), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loses_its_sites_and_saves_the_others(tmp_path, family):
    model = tiny_peft_model(family, 2, rank=2)
    sites = find_sites(model)
    kept = [index % 4 == 1 for index in range(len(sites))]
    inputs = tiny_inputs(family)
    with torch.no_grad():
        for site, stays in zip(sites, kept, strict=True):
            if not stays:
                site_parameters(site.module, site.adapter)[1].zero_()
        expected = model(**inputs).logits
        survivors = disconnect_(model, sites, kept)
        torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-6, rtol=0)
        assert [site.name for site in find_sites(model)] == [site.name for site in survivors]
        survivors = grow_(model, survivors, as_published(survivors, len(sites)), torch.Generator().manual_seed(0))
        assert {site.rank for site in survivors} == {2 * len(sites) // sum(kept)}
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tiny_model(family, 2), tmp_path)
        torch.testing.assert_close(loaded.eval()(**inputs).logits, expected, atol=1e-5, rtol=0)
    assert [site.name for site in find_sites(loaded)] == [site.name for site in survivors]


def test_ranks_and_alphas_of_each_site_survive_saving(tmp_path):
    """Mixed ranks and rsLoRA, growth stopped by the size of the map, settings that narrowed target_modules."""
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        target_modules=["q_proj", "k_proj", "up_proj"],
        rank_pattern={"k_proj": 8, "layers.0.mlp.up_proj": 2},
        alpha_pattern={"up_proj": 3},
        layers_to_transform=[0, 1],
        init_lora_weights=False,
    )
    model = get_peft_model(tiny_model("llama", 3), config).eval()
    sites = find_sites(model)
    expected_scales = {site.name: site.scaling for site in sites}
    stays = [site.layer == 0 or "k_proj" in site.name for site in sites]
    with torch.no_grad():
        for site, kept in zip(sites, stays, strict=True):
            if not kept:
                site.module.lora_B["default"].weight.zero_()
    expected = logits_of(model)
    survivors = disconnect_(model, sites, stays)
    survivors = grow_(model, survivors, as_published(survivors, 12), torch.Generator().manual_seed(0))
    ranks = {site.name.removeprefix("model.layers."): site.rank for site in survivors}
    assert ranks == {"0.self_attn.q_proj": 12, "0.self_attn.k_proj": 16, "0.mlp.up_proj": 6, "1.self_attn.k_proj": 16}
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama", 3), tmp_path)
    torch.testing.assert_close(logits_of(loaded), expected, atol=1e-5, rtol=0)
    for site in find_sites(loaded):
        assert site.scaling == pytest.approx(expected_scales[site.name]) and site.rank == ranks[site.name[13:]]


def test_an_optimizer_goes_on_as_if_it_had_never_held_the_others():
    """Two optimizers over the same survivors, one of which began with more; named parameters, momentum, two groups."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(3, 2, generator=generator) for _ in range(4)]
    gradients = torch.randn(6, 4, 3, 2, generator=generator)

    def train(optimizer_class, held):
        params = {index: nn.Parameter(start[index].clone()) for index in held}
        groups = [
            {"params": [(f"p{i}", params[i]) for i in held if i < 2], "lr": 0.1},
            {"params": [(f"p{i}", params[i]) for i in held if i >= 2], "lr": 0.2},
        ]
        optimizer = optimizer_class(groups)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, 6)
        for step in range(6):
            if step == 3:
                forget_parameters_(optimizer, [params[i] for i in held if i not in (1, 2)])
            for index in held:
                params[index].grad = gradients[step, index].clone() if step < 3 or index in (1, 2) else None
            optimizer.step()
            schedule.step()
        return [params[1].detach(), params[2].detach()], optimizer

    for optimizer_class in (torch.optim.AdamW, torch.optim.RMSprop):
        expected, _ = train(optimizer_class, [1, 2])
        seen, optimizer = train(optimizer_class, [0, 1, 2, 3])
        assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))
        assert [group["param_names"] for group in optimizer.param_groups] == [["p1"], ["p2"]]
        assert len(optimizer.state) == 2
        optimizer_class([torch.zeros(1)]).state_dict()
        assert [len(group["params"]) for group in optimizer.state_dict()["param_groups"]] == [1, 1]


def test_what_cannot_be_disconnected_is_refused():
    model = tiny_llama()
    sites = find_sites(model)
    with pytest.raises(BudgetError, match="None of the 14 sites stays"):
        disconnect_(model, sites, [False] * len(sites))
    model.add_adapter("other", LoraConfig(target_modules=["v_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(AdapterError, match=r"v_proj carries the adapter 'other' as well"):
        disconnect_(model, sites, [index == 0 for index in range(len(sites))])
    assert len(find_sites(model, "default")) == N_SITES


def test_served_ranks_are_one_rank_on_more_sites_and_the_added_ones_keep_what_they_learned(tmp_path):
    model = tiny_llama(rank=2)
    budget = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    callback = WeightLora(2, WARMUP, dense_steps=1, grow="served", seed=3)
    before, after = Watch({"on_optimizer_step": lora_b}), Watch({"on_step_end": lora_b})
    make_trainer(tmp_path, model, callback, before, after, steps=WARMUP + 2).train()
    kept = callback.selection.kept
    assert {site.rank for site in kept} == {8} and len(kept) > 2
    assert budget - 8 * 96 < sum(site.n_parameters for site in find_sites(model)) <= budget
    scores = {site.name: site.score for site in callback.selection.sites}
    best = sorted(scores, key=lambda name: -scores[name])[:2]
    assert set(best) < {site.name for site in kept}
    gates = dict(zip(scores, (tmp_path / "gates.jsonl").read_text().splitlines(), strict=False))
    assert len(gates) == WARMUP
    for name, B in after.seen[WARMUP - 1].items():
        assert B[:, :2].any() and not B[:, 2:].any() and before.seen[WARMUP - 1][name].any()
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.rank_pattern, config.alpha_pattern) == (8, 16, {}, {})


def lora_b(model):
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters() if "lora_B" in name}
