"""Sites: where the LoRA adapters of a model are, and in which order they stand.

The only file that knows PEFT's layer classes and the names of layers in model families.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from lorazor.errors import AdapterError, UnsupportedAdapterError
from lorazor.selection import SelectedSite

# Settings of a LoraConfig that change what a site computes, so that gate 0 would not be the base model.
_VARIANT_FIELDS = (
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
    "layer_replication",
    "megatron_config",
)
AS_PLAIN_LORA = "PEFT makes plain LoRA of it, as near as a rank allows: peft.save_as_lora(folder, model, rank=...)."
DORA_OF_EMBEDDING = f"is an embedding with DoRA, which has no gate. Leave it out of target_modules. {AS_PLAIN_LORA}"
# Initialisations that leave the base weights as they are. PiSSA, CorDA, OLoRA, LoftQ and LoRA-GA move part of the
# base weight into the adapter at load time: a dropped site would get that part back twice.
_HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal")

INSIDE = ".base_layer"
"""What PEFT puts behind the name of a module, for each parameter of it that has LoRA further out."""


@dataclass(frozen=True)
class Site:
    """One LoRA adapter on one module, or on one parameter.

    Attributes:
        name: full name in the base model, of the module, `model.layers.0.self_attn.q_proj`, or of the parameter,
            `model.layers.0.mlp.experts.down_proj`.
        stack: name of the list of layers it is in, `model.layers`; None outside every stack.
        layer: zero-based index in the stack, in execution order; None outside every stack.
        kind: projection kind, `self_attn.q_proj`: the rest of the name, less its numbers.
        rank: r, rows of A.
        scaling: s in `h = W x + s B A x`; alpha / r (arXiv:2106.09685), or alpha / sqrt(r) with rsLoRA
            (arXiv:2312.03732).
        n_parameters: trainable numbers in A and B (and the bias of B, or the magnitudes of DoRA, where there are any).
        has_directions: whether the update can be taken apart into r rank-one directions, each with a gate of its own:
            A and B are linear maps, without a bias of B. Embeddings, convolutions and DoRA stay or go whole.
        n_experts: E, of a parameter that holds a matrix for each expert: direction j is then the j-th one of every
            expert, with one gate for all of them, since a file has one rank for all.
        is_on_parameter: whether the update is added to a parameter (PEFT's `target_parameters`), instead of to what a
            module puts out. No token is seen to pass through A then.
        is_dora: h = m (W + s B A) x / ||W + s B A|| with a trained m (arXiv:2402.09353). Nothing but all of it or none
            of it can be written, and m counts among its parameters.
    """

    name: str
    stack: str | None
    layer: int | None
    kind: str
    rank: int
    scaling: float
    n_parameters: int
    has_directions: bool = True
    n_experts: int = 1
    is_on_parameter: bool = False
    is_dora: bool = False

    def to_row(self) -> dict[str, Any]:
        """Where it is and how large, as plain data: a line of `sites.jsonl`."""
        names = ("stack", "layer", "kind", "n_parameters")
        return {"site": self.name, **{name: getattr(self, name) for name in names}}

    def entry(self, keep: bool, **choices: Any) -> SelectedSite:
        """What a selection says about it, see `SelectedSite`."""
        where = (self.name, self.layer, self.stack, self.kind)
        return SelectedSite(*where, self.rank, keep, is_on_parameter=self.is_on_parameter, **choices)

    @property
    def n_gates(self) -> int:
        """Numbers that gate this site: one per direction, or one for all of it."""
        return self.rank if self.has_directions else 1


@dataclass(frozen=True)
class LiveSite(Site):
    """A site of a loaded model.

    Attributes:
        module: PEFT's LoRA layer; of parameters of one module, one is inside the other.
        adapter: the adapter's name in that layer.
    """

    module: LoraLayer = field(repr=False, compare=False, kw_only=True)
    adapter: str = field(default="default", kw_only=True)


AnySite = TypeVar("AnySite", bound=Site)


def locate(name: str) -> tuple[str | None, int | None, str]:
    """Stack, layer and projection kind of a module, read off its name.

    The first number in a module's name is its layer, what stands before it is its stack. This holds for every
    transformer in `tests/tiny_models.py` (`model.layers.3.…`, `transformer.h.3.…`, `encoder.block.3.layer.0.…`)
    and needs no model, so that adapter folders can be read alone.

    Args:
        name: full module name, `model.layers.0.self_attn.q_proj`.
    Returns:
        ("model.layers", 0, "self_attn.q_proj"), or (None, None, "lm_head") outside every stack.
    """
    match = re.fullmatch(r"(?P<stack>.+?)\.(?P<layer>\d+)\.(?P<rest>.+)", name)
    if match is None:
        return None, None, name
    kind = ".".join(part for part in match["rest"].split(".") if not part.isdigit())
    return match["stack"], int(match["layer"]), kind


def in_order(sites: Iterable[AnySite]) -> list[AnySite]:
    """The one order of the sites of an adapter, loaded or in a folder: by stack, layer and name.

    Encoders come before decoders, and sites outside every stack last. Stacks and layers stand as they run; within a
    layer the order is that of the names, which a folder knows too. Copies of a site stay as given.
    """

    def position(site: Site) -> tuple[Any, ...]:
        return site.stack is None, "decoder" in (site.stack or ""), site.stack, site.layer, site.name

    return sorted(sites, key=position)


def stack_sizes(sites: Iterable[Site]) -> dict[str, int]:
    """Number of layers L of each stack: one more than the highest layer that carries a site.

    Layers above the highest site have no LoRA, so every boundary above it is the same adapter.
    """
    sizes: dict[str, int] = {}
    for site in sites:
        if site.stack is not None and site.layer is not None:
            sizes[site.stack] = max(sizes.get(site.stack, 0), site.layer + 1)
    return sizes


def choose_stack(sites: Sequence[Site], stack: str | None = None) -> str:
    """The stack a boundary runs through: the one named, the only one, the decoder, or that of the text model.

    Raises:
        AdapterError: no such stack, or several and not one of them a decoder or of a text model.
    """
    sizes = stack_sizes(sites)
    listed = ", ".join(f"{name} ({size} layers)" for name, size in sizes.items())
    if not sizes:
        raise AdapterError("The adapter has no LoRA site in a stack of layers, so there is no boundary to move.")
    if stack is not None:
        matches = [name for name in sizes if name == stack] or [name for name in sizes if stack in name.split(".")]
        if len(matches) != 1:
            raise AdapterError(f"stack={stack!r} names {len(matches)} stacks of this adapter. It has: {listed}.")
        return matches[0]
    decoders = [name for name in sizes if "decoder" in name.split(".")]
    texts = [name for name in sizes if {"language_model", "text_model"} & {*name.split(".")}]
    candidates = list(sizes) if len(sizes) == 1 else decoders or texts
    if len(candidates) != 1:
        raise AdapterError(f"The adapter has several stacks: {listed}. Choose one with stack=... (--stack).")
    return candidates[0]


def is_kept(site: Site, stack: str, boundary: int) -> bool:
    """Whether boundary b of a stack keeps a site: it is in the first b layers, or outside the stack."""
    return site.stack != stack or site.layer is None or site.layer < boundary


def find_sites(model: nn.Module, adapter: str | None = None) -> list[LiveSite]:
    """Find every LoRA site of one adapter of a model.

    Args:
        model: a `PeftModel`, or a transformers model with an adapter loaded by `load_adapter`.
        adapter: the adapter's name; may be left out where the model has one adapter or one active adapter.
    Returns:
        The sites by stack, layer and name, see `in_order`; those outside every stack come last.
    Raises:
        AdapterError: no such adapter, or no LoRA sites, or the adapter is merged into the base weights.
        UnsupportedAdapterError: the adapter is not plain LoRA.
    """
    configs = getattr(model, "peft_config", None)
    if not configs:
        raise AdapterError(f"{type(model).__name__} has no PEFT adapter. Wrap it with peft.get_peft_model first.")
    adapter = _choose_adapter(model, configs, adapter)
    check_is_plain_lora(configs[adapter].to_dict(), f"adapter {adapter!r}")
    get_base_model: Any = getattr(model, "get_base_model", None)
    base = get_base_model() if get_base_model else model
    sites = [
        _live_site(name_in_base(name, module), module, adapter)
        for name, module in base.named_modules()
        if isinstance(module, LoraLayer) and (adapter in module.lora_A or adapter in module.lora_embedding_A)
    ]
    if not sites:
        raise AdapterError(f"The adapter {adapter!r} has no LoRA sites in {type(base).__name__}.")
    check_is_unmerged(sites)
    return in_order(sites)


def check_is_unmerged(sites: Iterable[LiveSite]) -> None:
    """Raise AdapterError for a site that is merged into its base weight, where nothing that is done to it shows."""
    for site in sites:
        if getattr(site.module, "merged", False):
            raise AdapterError(
                f"{site.name} is merged into its base weight. Call unmerge_adapter() on the model first."
            )


def check_is_plain_lora(config: Mapping[str, Any], where: str) -> None:
    """Refuse adapters whose gate 0 would not be the base model.

    Args:
        config: the fields of an `adapter_config.json`.
        where: names the adapter in the message.
    Raises:
        UnsupportedAdapterError: not LoRA, a LoRA variant, trained biases, or an init that changes base weights.
    """
    advice = "lorazor handles plain LoRA (and rsLoRA, rank_pattern, alpha_pattern), and DoRA by whole sites."
    peft_type = getattr(config.get("peft_type"), "value", config.get("peft_type"))
    if peft_type in ("LOHA", "LOKR"):
        advice += f" {AS_PLAIN_LORA}"
    elif peft_type == "ADALORA":
        advice += " Save it, and pass the folder: AdaLoRA is read there as the plain LoRA that it is."
    if peft_type != "LORA":
        raise UnsupportedAdapterError(f"{where} is a {peft_type} adapter. {advice}")
    for name in _VARIANT_FIELDS:
        if config.get(name):
            raise UnsupportedAdapterError(f"{where} sets {name}={config[name]!r}. {advice}")
    init = config.get("init_lora_weights", True)
    if init not in _HARMLESS_INITS:
        raise UnsupportedAdapterError(
            f"{where} was initialised with {init!r}, which changes the base weights when the adapter is loaded. "
            f"Convert it to plain LoRA first (PEFT: save_pretrained(path_initial_model_for_weight_conversion=...))."
        )
    if config.get("bias", "none") != "none":
        raise UnsupportedAdapterError(
            f"{where} trains biases (bias={config['bias']!r}), which stay on when a site is silenced. {advice}"
        )


def name_in_base(name: str, module: LoraLayer) -> str:
    """The name that a module with LoRA has in the base model, or the parameter that a wrapper of PEFT has LoRA on.

    Args:
        name: of the module in the model with LoRA; of two parameters of one module, the second has the first inside.
        module: the module.
    """
    if not isinstance(module, ParamWrapper):
        return name
    return f"{without_wrappers(name)}.{module.parameter_name}"


def without_wrappers(name: str) -> str:
    """The name in the base model of a module whose parameters PEFT has wrapped, one around the other."""
    while name.endswith(INSIDE):
        name = name.removesuffix(INSIDE)
    return name


def target_modules_of(config: Mapping[str, Any]) -> Callable[[str], bool]:
    """Whether `target_modules`, and what narrows them down, put LoRA on a module, as PEFT reads a config."""
    names = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    settings: dict[str, Any] = {name: config.get(name) for name in names}
    if not settings["target_modules"]:
        return lambda module: False
    targets = LoraConfig(**settings)
    return lambda module: bool(check_target_module_exists(targets, module))


def _choose_adapter(model: nn.Module, configs: Mapping[str, Any], adapter: str | None) -> str:
    names = list(configs)
    if adapter is None:
        active: Any = getattr(model, "active_adapters", None)
        active = active() if callable(active) else active
        active = [active] if isinstance(active, str) else list(active or names)
        if len(active) != 1:
            raise AdapterError(f"The model has {len(active)} active adapters: {', '.join(active)}. Name one of them.")
        adapter = str(active[0])
    if adapter not in configs:
        raise AdapterError(f"adapter={adapter!r} is not on this model. It has: {', '.join(names)}.")
    return adapter


def _live_site(name: str, module: LoraLayer, adapter: str) -> LiveSite:
    if isinstance(module, MultiheadAttention):
        raise UnsupportedAdapterError(f"{name}: LoRA on {type(module).__name__} has no gate. Leave this module out.")
    is_dora = bool(module.use_dora.get(adapter))
    if is_dora and adapter in module.lora_embedding_A:
        raise UnsupportedAdapterError(f"{name} {DORA_OF_EMBEDDING}")
    if adapter in module.lora_variant and not is_dora:
        variant = module.lora_variant[adapter]
        raise UnsupportedAdapterError(f"{name} is a LoRA variant ({type(variant).__name__}); lorazor needs plain LoRA.")
    stack, layer, kind = locate(name)
    rank, alpha = module.r[adapter], module.lora_alpha[adapter]
    factors = [pairs[adapter] for pairs in (module.lora_A, module.lora_B) if adapter in pairs]  # none of an embedding
    return LiveSite(
        name=name,
        stack=stack,
        layer=layer,
        kind=kind,
        rank=rank,
        scaling=alpha / (math.sqrt(rank) if module.use_rslora[adapter] else rank),
        n_parameters=sum(parameter.numel() for parameter in site_parameters(module, adapter)),
        has_directions=bool(factors)
        and not is_dora
        and all(isinstance(one, nn.Linear) and one.bias is None for one in factors),
        n_experts=module.num_experts if isinstance(module, ParamWrapper) else 1,
        is_on_parameter=isinstance(module, ParamWrapper),
        is_dora=is_dora,
        module=module,
        adapter=adapter,
    )


def site_parameters(module: LoraLayer, adapter: str) -> list[nn.Parameter]:
    """A and B of one site (and the bias of B, and the magnitudes of DoRA, where there are any)."""
    if adapter in module.lora_embedding_A:
        return [module.lora_embedding_A[adapter], module.lora_embedding_B[adapter]]
    own = [pairs[adapter] for pairs in (module.lora_A, module.lora_B, module.lora_magnitude_vector) if adapter in pairs]
    return [parameter for one in own for parameter in one.parameters()]
