"""What must hold before WeightLoRA trains in place: everything that would go wrong silently, refused in time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from accelerate.state import AcceleratorState
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainingArguments

from lorazor.adapter.gates import is_gated
from lorazor.adapter.sites import LiveSite, site_parameters
from lorazor.errors import AdapterError, SettingsError, UnsupportedAdapterError
from lorazor.select.weightlora import WeightLoraSettings

_SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "XLA")
_SHARDED_ADVICE = (
    "Choose the sites with 'lorazor select', in one process or under DDP, and train them there with 'lorazor train "
    "--selection selection.json', which is an ordinary PEFT run."
)
_ADVICE = "Use 'lorazor train --method weightlora', which chooses the sites in one run and trains them in another."


def check_arguments(args: TrainingArguments, model: nn.Module) -> None:
    """Refuse ways of training in which gates would be wrong.

    Raises:
        SettingsError: fp16 with a gradient scaler; FSDP, DeepSpeed, tensor parallelism; DataParallel; torch.compile;
            auto_find_batch_size.
    """
    state = AcceleratorState()
    kind = str(getattr(state.distributed_type, "value", state.distributed_type))
    if args.fp16 or state.mixed_precision == "fp16":
        raise SettingsError(
            "fp16=True scales the loss, so the gates' gradients would be scaled as well. Pass bf16=True, or neither."
        )
    if kind in _SHARDED or any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        what = kind if kind in _SHARDED else "tensor parallelism"
        raise SettingsError(f"Under {what}, gates are not supported. {_SHARDED_ADVICE}")
    if args.n_gpu > 1:
        raise SettingsError(
            f"The Trainer would spread each batch over {args.n_gpu} GPUs with DataParallel, which copies the gates. "
            f"Set CUDA_VISIBLE_DEVICES to one GPU, or start with 'accelerate launch'."
        )
    if args.torch_compile:
        raise SettingsError(
            "torch_compile=True is not supported: no test shows that a compiled model notices sites that go. "
            "Leave it off."
        )
    if args.auto_find_batch_size:
        raise SettingsError(
            "auto_find_batch_size=True starts the training over in the middle. Find the batch size first, then pass it."
        )


def check_in_place(args: TrainingArguments, model: nn.Module, settings: WeightLoraSettings) -> None:
    """Refuse ways of training in which sites cannot be taken out while it goes on.

    Raises:
        SettingsError: DDP that does not look for unused parameters; another rank under DDP.
    """
    if args.world_size <= 1:
        return
    if settings.grow or settings.by == "direction":
        what = f"grow={settings.grow!r}" if settings.grow else f"by={settings.by!r}"
        raise SettingsError(f"{what} makes new parameters, which DDP does not average over processes. {_ADVICE}")
    finds_unused = args.ddp_find_unused_parameters
    if finds_unused is None:  # the Trainer's own default
        is_plain = isinstance(model, PreTrainedModel)
        finds_unused = not (is_plain and (model.is_activation_checkpointing or args.activation_checkpointing))
    if not finds_unused or args.ddp_static_graph:
        raise SettingsError(
            "DDP waits for the gradients of every parameter that there was at the start. "
            "Pass ddp_find_unused_parameters=True, and leave ddp_static_graph off."
        )


def check_sites(model: nn.Module, sites: Sequence[LiveSite], settings: WeightLoraSettings) -> None:
    """Refuse models from which sites cannot be taken out cleanly.

    Raises:
        AdapterError: several adapters, scales that are not the adapter's own, or hooks on a site.
        UnsupportedAdapterError: tied adapters, DoRA, sites whose rank cannot grow, or without directions.
    """
    configs = cast(dict[str, Any], model.peft_config)
    if len(configs) > 1:
        raise AdapterError(
            f"The model has the adapters {', '.join(configs)}. Delete all but the one to train (delete_adapter)."
        )
    if getattr(configs[sites[0].adapter], "ensure_weight_tying", False):
        raise UnsupportedAdapterError("ensure_weight_tying=True ties sites, which cannot go one by one. Set it False.")
    for site in sites:
        if settings.by == "direction" and (site.is_on_parameter or not site.has_directions):
            why = (
                "DoRA (use_dora), which stays or goes whole"
                if site.is_dora
                else "LoRA on a parameter, where no token is seen in training"
                if site.is_on_parameter
                else "an embedding, a convolution, or has a bias of B (lora_bias), and no directions"
            )
            raise UnsupportedAdapterError(
                f"{site.name} is {why}. Leave it out of target_modules, or choose by='site'; 'lorazor shrink' takes it."
            )
        if site.is_dora:
            raise UnsupportedAdapterError(
                f"{site.name} is DoRA (use_dora), into which a learned gate cannot be folded. Train plain LoRA, or "
                "drop sites afterwards: lorazor shrink --by site."
            )
        if is_gated(site):
            raise AdapterError(
                f"{site.name} has a gate already: WeightLora was added twice, or an earlier training broke off. "
                f"Add it once, to a freshly loaded model."
            )
        scale: Any = site.module.scaling[site.adapter]
        if not math.isclose(scale, site.scaling, rel_tol=1e-6):
            raise AdapterError(
                f"{site.name} is scaled by {scale}, but its adapter says {site.scaling}, which is what would be saved. "
                f"Call unscale_layer() on it first."
            )
        module = cast(nn.Module, site.module)
        if module._forward_hooks or module._forward_pre_hooks:
            raise AdapterError(
                f"{site.name} has a forward hook (NEFTune or activation checkpointing put one on embeddings), which "
                f"would go with it. Leave it out of target_modules."
            )
        is_convolution = site_parameters(site.module, site.adapter)[0].ndim != 2
        if settings.grow and (is_convolution or site.is_on_parameter):
            what = "a convolution" if is_convolution else "LoRA on a parameter"
            raise UnsupportedAdapterError(
                f"{site.name} is {what}, whose rank cannot grow. Pass grow=None (--method weightlora), or "
                "leave it out of target_modules."
            )


def check_optimizer(sites: Sequence[LiveSite], optimizer: torch.optim.Optimizer) -> None:
    """Refuse sites that are frozen, and optimizers that do not hold them.

    Raises:
        AdapterError: a site has no trainable parameter.
        SettingsError: the optimizer lacks a trainable parameter of a site.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for site in sites:
        trainable = [p for p in site_parameters(site.module, site.adapter) if p.requires_grad]
        if not trainable:
            raise AdapterError(f"{site.name} is frozen. Load the adapter with is_trainable=True.")
        if any(id(parameter) not in held for parameter in trainable):
            raise SettingsError(
                f"The optimizer does not hold the parameters of {site.name}, so they cannot be taken out of it. "
                f"Let the Trainer make the optimizer, or pass one over all trainable parameters."
            )
