"""What lorazor does on one family, against oracles that are not lorazor's: stock PEFT, and B changed by hand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor

from lorazor.adapter.folder import BASE_PREFIX, read_adapter
from lorazor.adapter.load import Loaded, load
from lorazor.adapter.parts import Parts
from lorazor.adapter.prune import write_pruned
from lorazor.adapter.sites import choose_stack, find_sites, stack_sizes
from lorazor.data.batches import Batch, make_batches
from lorazor.measure.engines import choose_engine, naive_losses, on_model, one_pass_losses
from lorazor.measure.losses import row_losses
from lorazor.measure.meter import DATA, Meter
from lorazor.runs import RunFolder
from lorazor.select.credit import path_credit
from lorazor.selection import SelectedSite, Selection
from lorazor.settings import DataSettings, GenerationSettings, ModelSettings
from tests.architectures.subjects import (
    Subject,
    columns_scaled,
    in_words,
    lora_factors,
    losses_by_hand,
    one_row,
    tiny_examples,
    tiny_tokenizer,
)
from tests.architectures.tiny_configs import decoder_start

TOLERANCE = 1e-4
# Gauss-Legendre quadrature with two points on 0..1
POINTS = (0.5 - 0.5 / 3**0.5, 0.5 + 0.5 / 3**0.5)


class StockFails(Exception):
    """Stock PEFT cannot do it, so there is nothing to compare with."""


def check_equal(found: Tensor, expected: Tensor, what: str, relative: float = 1e-5) -> None:
    """Fail where two sets of losses or credits, in nats, differ."""
    found, expected = found.detach().double(), expected.detach().double()
    largest, difference = float(expected.abs().max()), float((found - expected).abs().max())
    assert difference <= TOLERANCE + relative * largest, f"{what} differ by {difference:.1g} of {largest:.1g}"


def check_sites(subject: Subject) -> None:
    """The sites of the live model and of the folder are those whose tensors PEFT wrote; of experts, the parameters."""
    with safe_open(subject.adapter_folder / "adapter_model.safetensors", framework="pt") as file:
        expected = sorted({key.removeprefix(BASE_PREFIX).split(".lora_")[0] for key in file.keys() if ".lora_" in key})
    if subject.task == "experts":
        assert len(expected) == len(lora_factors(subject.model))
        expected = sorted(lora_factors(subject.model))
    assert sorted(site.name for site in find_sites(subject.model)) == expected, "sites of the live model"
    assert sorted(site.name for site in read_adapter(subject.adapter_folder).sites) == expected, "sites of the folder"


def check_sweep(subject: Subject) -> str:
    """Every boundary of every stack equals B zeroed beyond it; returns the engines that ran."""
    model, sites = subject.model, find_sites(subject.model)
    base: Any = model.get_base_model()
    choose_stack(sites, next(iter(stack_sizes(sites)), None))  # refuses where there is none
    engines = set()
    for stack, n_layers in stack_sizes(sites).items():
        boundaries = range(n_layers + 1)
        first = on_model(base, subject.batch, stack)
        engine, _ = choose_engine(base, sites, first, stack, boundaries)
        measure = one_pass_losses if engine == "one-pass" else naive_losses
        losses = measure(base, sites, first, stack, boundaries)
        for boundary in boundaries:
            beyond = [name for name in lora_factors(model) if _is_beyond(name, stack, boundary)]
            with torch.no_grad(), columns_scaled(model, dict.fromkeys(beyond, 0.0)):
                expected = losses_by_hand(model, subject.batch)
            check_equal(losses[boundary].nll_nats, expected, f"losses at boundary {boundary} of {stack} ({engine})")
        engines.add(engine)
    return ", ".join(sorted(engines))


def _is_beyond(name: str, stack: str, boundary: int) -> bool:
    layer = re.match(rf"{re.escape(stack)}\.(\d+)\.", name)
    return layer is not None and int(layer[1]) >= boundary


def check_reload(subject: Subject, folder: Path) -> None:
    """What `load` reads from disk computes what the live model does, and the meter does so from texts.

    Also where stock PEFT loads another adapter than it saved without a word: then this is refused.
    """
    with torch.no_grad():
        expected = losses_by_hand(subject.model, subject.batch)
        loaded = load(subject.adapter_folder, ModelSettings(model=str(subject.base_folder)))
        check_equal(losses_by_hand(loaded.model, subject.batch), expected, "losses of what was loaded")
        _check_texts(subject, loaded, folder)


def _check_texts(subject: Subject, loaded: Loaded, folder: Path) -> None:
    """The losses of examples that lorazor tokenises, with all sites on; what a decoder reads is transformers' rule."""
    examples, base = tiny_examples(subject.task), subject.model.get_base_model()
    batches = make_batches(examples, tiny_tokenizer(subject.does), subject.does, decoder_inputs=torch.zeros_like)
    (batch,) = batches.batches
    if subject.does == "seq2seq":
        base.config.decoder_start_token_id = decoder_start(base)
        shift = getattr(base, "prepare_decoder_input_ids_from_labels", None)  # as DataCollatorForSeq2Seq has it
        labels = batch.targets.clone()
        answers = {"labels": labels} if shift is None else {"decoder_input_ids": shift(labels=labels)}
        inputs = {name: batch.inputs[name] for name in ("input_ids", "attention_mask")}
        batch = Batch(batch.indices, {**inputs, **answers}, batch.targets)
    by_hand = dict(zip(batch.indices, losses_by_hand(subject.model, batch).tolist(), strict=True))
    run = RunFolder.start(folder, "texts", {}, {}, resume=False)
    reading = DataSettings(batch_size=len(examples))
    meter = Meter(loaded, run, reading, GenerationSettings(), lambda message: None)
    meter.add(DATA, examples)
    (found,) = meter.losses([meter.full], DATA)
    columns = [[by_hand[one.index] for one in examples], [found[one.index]["nll_nats"] for one in examples]]
    check_equal(torch.tensor(columns[1]), torch.tensor(columns[0]), "losses of texts")


def check_that_stock_reloads(subject: Subject) -> None:
    """Fail where the adapter that PEFT saved is another one when PEFT loads it.

    Raises:
        StockFails: it is.
    """
    try:
        model = PeftModel.from_pretrained(subject.fresh_base(), subject.adapter_folder).eval()
    except Exception as error:
        raise StockFails(f"it cannot load what it saved: {in_words(error)}") from error
    with torch.no_grad():
        expected, found = (losses_by_hand(one, subject.batch) for one in (subject.model, model))
    if float((found - expected).abs().max()) > TOLERANCE:
        raise StockFails("it loads another adapter than it saved")


def check_directions(subject: Subject) -> None:
    """Gates of directions equal columns of B zeroed; credits of each row equal gradients by hand of that row alone."""
    model, batch = subject.model, subject.batch
    base: Any = model.get_base_model()
    with torch.no_grad():
        before = losses_by_hand(model, batch)
        parts = Parts.singular_(find_sites(model))
        check_equal(losses_by_hand(model, batch), before, "losses in singular form")
        gates = torch.randint(0, 2, (len(parts),), generator=torch.Generator().manual_seed(3)).float()
        with parts.gated(gates):
            found = row_losses(base, batch).nll_nats
        factors = dict(parts.by_site(gates))
        with columns_scaled(model, factors):
            check_equal(found, losses_by_hand(model, batch), "losses of gated directions")
    found = torch.from_numpy(path_credit(base, [batch], parts.gated, torch.ones(len(parts)), len(POINTS)).credits)
    names = [site.name for site in parts.sites]
    expected = torch.stack([_credits_by_hand(subject, row, names) for row in range(len(batch.indices))])
    check_equal(found, expected, "credits of directions", 1e-4)


def _credits_by_hand(subject: Subject, row: int, names: list[str]) -> Tensor:
    """(n_directions,): minus the mean over two points of the gradient of B's columns times these columns."""
    batch = one_row(subject.batch, row)
    factors = lora_factors(subject.model)
    Bs = [factors[name] for name in names]
    full = [B.detach().clone() for B in Bs]
    credits = [torch.zeros(B.shape[1]) for B in Bs]
    for position in POINTS:
        with columns_scaled(subject.model, dict.fromkeys(names, position)):
            loss = losses_by_hand(subject.model, batch).sum()
            parameters = [B if B._base is None else B._base for B in Bs]  # views of experts' were not used
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for site, (gradient, B) in enumerate(zip(gradients, full, strict=True)):
            if gradient is not None:  # what text does not reach
                credits[site] -= 0.5 * (gradient.view_as(B) * B).sum(dim=0).reshape(len(credits[site]), -1).sum(dim=1)
    return torch.cat(credits)


def check_prune(subject: Subject, folder: Path) -> None:
    """Half of the sites and some directions dropped: stock PEFT computes the live model with these columns zeroed."""
    model = subject.model
    check_that_stock_reloads(subject)
    with torch.no_grad():
        Parts.singular_(find_sites(model))  # column j of B is now direction j
        entries, factors = [], {}
        for index, site in enumerate(read_adapter(subject.adapter_folder).sites):
            is_kept, components = index % 2 == 0, (0,) if index % 4 == 0 else None
            entry = SelectedSite(site.name, site.layer, site.stack, site.kind, site.rank, is_kept)
            if is_kept and components:
                entry = SelectedSite(**{**vars(entry), "components": components})
            entries.append(entry)
            factors[site.name] = torch.tensor(
                [float(is_kept and (not components or j in components)) for j in range(site.rank)]
            )
        write_pruned(subject.adapter_folder, Selection(tuple(entries), "manual"), folder)
        pruned = PeftModel.from_pretrained(subject.fresh_base(), folder).eval()
        with columns_scaled(model, factors):
            check_equal(
                losses_by_hand(pruned, subject.batch), losses_by_hand(model, subject.batch), "losses after pruning"
            )
