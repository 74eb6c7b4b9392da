"""The form of an adapter, as far as servers make something of it.

Every property lists what it is about, by name; an empty one says that the adapter is not of that form. They are the
conditions of the rules in `table.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

from lorazor.adapter.beside import parameter_of
from lorazor.adapter.folder import AdapterFolder, setting_of, split_key
from lorazor.adapter.sites import locate, stack_sizes
from lorazor.serve.base import GROUPS, BaseOutline, absent_from_groups
from lorazor.serve.table import VLLM_EMBEDS, VLLM_EXPERTS, Outcome

Names: TypeAlias = tuple[str, ...]


@dataclass(frozen=True)
class Form:
    """An adapter folder, and its base model as far as that is known.

    Attributes:
        folder: the adapter.
        base: without it, layers above the highest one with LoRA are taken not to exist.
    """

    folder: AdapterFolder
    base: BaseOutline | None = None

    @cached_property
    def names(self) -> Names:
        """Every site."""
        return tuple(site.name for site in self.folder.sites)

    @cached_property
    def n_layers(self) -> Mapping[str, int]:
        """Layers of each stack with LoRA."""
        own = stack_sizes(self.folder.sites)
        return {
            stack: max(size, self.base.n_layers.get(stack, 0)) if self.base else size for stack, size in own.items()
        }

    @property
    def rslora(self) -> Names:
        """Sites whose scaling is alpha / sqrt(r) and not alpha / r."""
        if not self.folder.config.get("use_rslora"):
            return ()
        return tuple(site.name for site in self.folder.sites if site.rank > 1)

    @property
    def own_alpha(self) -> Names:
        """Sites with another alpha than `lora_alpha`."""
        config = self.folder.config
        alpha = setting_of(config, "lora_alpha")
        return tuple(name for name in self.names if setting_of(config, "lora_alpha", name) != alpha)

    @property
    def own_rank(self) -> Names:
        """Sites with another rank than `r`."""
        rank = setting_of(self.folder.config, "r")
        return tuple(site.name for site in self.folder.sites if site.rank != rank)

    @property
    def padded_rank(self) -> Names:
        """Sites whose rank is neither 8 nor a multiple of 16, as SGMV kernels have it."""
        return tuple(site.name for site in self.folder.sites if site.rank != 8 and site.rank % 16)

    @property
    def rank_above_512(self) -> Names:
        """Sites of a rank above 512."""
        return tuple(site.name for site in self.folder.sites if site.rank > 512)

    @property
    def fractional_alpha(self) -> Names:
        """`lora_alpha`, where it is no whole number as it is written: 16.0 is none."""
        return () if isinstance(self.folder.config.get("lora_alpha", 8), int) else ("lora_alpha",)

    @property
    def absent_layers(self) -> Names:
        """Modules without LoRA whose likes in other layers have it."""
        here = set(self.names)
        rests: dict[tuple[str, str], None] = {}
        for site in self.folder.sites:
            if site.stack is not None:
                rests[site.stack, site.name.removeprefix(f"{site.stack}.{site.layer}.")] = None
        found = (
            f"{stack}.{layer}.{rest}" for stack, rest in rests for layer in range(self.n_layers[stack])
        )  # of each kind, in every layer
        return tuple(name for name in found if name not in here and (self.base is None or name in self.base.linear))

    @property
    def absent_v(self) -> Names:
        """v_proj, where there is q_proj."""
        return absent_from_groups(self.names, "v_proj", ("q_proj",))

    @property
    def absent_q(self) -> Names:
        """q_proj, where there is k_proj or v_proj."""
        return absent_from_groups(self.names, "q_proj", ("k_proj", "v_proj"))

    @property
    def absent_gate(self) -> Names:
        """gate_proj, where there is up_proj."""
        return absent_from_groups(self.names, "gate_proj", ("up_proj",))

    @property
    def saved_modules(self) -> Names:
        """Modules that the adapter replaces as a whole (`modules_to_save`)."""
        return tuple(dict.fromkeys(_module_of(key) for key in self._beside if not key.endswith(_DELTA)))

    @property
    def saved_but_heads(self) -> Names:
        """Those of `saved_modules` that are no classifier's head."""
        return tuple(name for name in self.saved_modules if name.rpartition(".")[2] not in ("classifier", "score"))

    @property
    def saved_norms(self) -> Names:
        """Those of `saved_modules` that are norms."""
        return tuple(name for name in self.saved_modules if "norm" in name.rpartition(".")[2])

    @property
    def saved_but_norms(self) -> Names:
        """Those of `saved_modules` that are no norms."""
        return tuple(name for name in self.saved_modules if name not in self.saved_norms)

    @property
    def saved_in_layers(self) -> Names:
        """Those of `saved_modules` that are in a layer."""
        return tuple(name for name in self.saved_modules if locate(name)[0] is not None)

    @property
    def saved_inside(self) -> Names:
        """Those of `saved_modules` that are neither embedding nor output layer."""
        ends = ("embed_tokens", "lm_head")
        return tuple(name for name in self.saved_modules if name.rpartition(".")[2] not in ends)

    @property
    def trained_tokens(self) -> Names:
        """Embeddings of which some rows are trained (`trainable_token_indices`)."""
        return tuple(dict.fromkeys(_module_of(key) for key in self._beside if key.endswith(_DELTA)))

    @property
    def bias_of_b(self) -> Names:
        """Sites whose B has a bias (`lora_bias`)."""
        return tuple(name for name, keys in self.folder.keys.items() if "lora_B.bias" in keys)

    @property
    def dora(self) -> Names:
        """Sites of DoRA."""
        return tuple(site.name for site in self.folder.sites if site.is_dora)

    @property
    def experts(self) -> Names:
        """Parameters of experts with LoRA, all experts of a layer in one."""
        return tuple(site.name for site in self.folder.sites if site.n_experts > 1)

    @property
    def parameters(self) -> Names:
        """Other parameters with LoRA, such as those of routers."""
        return tuple(site.name for site in self.folder.sites if site.is_on_parameter and site.n_experts == 1)

    @property
    def experts_refused_by_vllm(self) -> Names:
        """Those of `experts` in a model of which vLLM is known to refuse them."""
        return self._experts_in_vllm("refused")

    @property
    def experts_lost_by_vllm(self) -> Names:
        """Those of `experts` in a model of which vLLM is known to leave them out."""
        return self._experts_in_vllm("wrong")

    @property
    def experts_unknown_to_vllm(self) -> Names:
        """Those of `experts` in other models."""
        return self._experts_in_vllm("unknown")

    def _experts_in_vllm(self, outcome: Outcome) -> Names:
        found = VLLM_EXPERTS.get(self.base.architecture if self.base else "", "unknown")
        return self.experts if found == outcome else ()

    @property
    def embeddings(self) -> Names:
        """Embeddings with LoRA."""
        return tuple(name for name, keys in self.folder.keys.items() if "lora_embedding_A" in keys)

    @property
    def head(self) -> Names:
        """The output layer, where it has LoRA."""
        return tuple(name for name in self.names if name.rpartition(".")[2] == "lm_head")

    @property
    def head_or_embeddings(self) -> Names:
        """Output layer and embeddings, where they have LoRA."""
        return (*self.head, *self.embeddings)

    @property
    def unwrapped_by_vllm(self) -> Names:
        """Output layer and embeddings with LoRA, of a model of which vLLM has them without."""
        is_known = self.base is None or self.base.architecture.removesuffix("ForCausalLM") in VLLM_EMBEDS
        return () if is_known else self.head_or_embeddings

    @property
    def tied_head(self) -> Names:
        """The output layer, where it has LoRA, and shares its weights with the embedding."""
        return self.head if self.base is not None and self.base.is_tied else ()

    @property
    def unknown_to_tgi(self) -> Names:
        """Sites in layers on other modules than those that Llama has."""
        known = {last for group in GROUPS for last in group} | {"o_proj", "down_proj"}
        in_layers = (site.name for site in self.folder.sites if site.stack is not None)
        return tuple(name for name in in_layers if name.rpartition(".")[2] not in known)

    @property
    def expression(self) -> Names:
        """`target_modules`, where it is a regular expression."""
        targets = self.folder.config.get("target_modules")
        return (targets,) if isinstance(targets, str) and targets not in ("all", "all-linear") else ()

    @property
    def unknown_to_ollama(self) -> Names:
        """The architecture, where Ollama imports no adapters of it."""
        known = ("LlamaForCausalLM", "Gemma2ForCausalLM")
        return () if self.base is None or self.base.architecture in known else (self.base.architecture,)

    @cached_property
    def _beside(self) -> Names:
        """Keys of what is no LoRA, less copies of the base's own weights, which PEFT saves with LoRA on embeddings."""
        return tuple(key for key in self.folder.shapes if split_key(key) is None and ".base_layer." not in key)


_DELTA = ".trainable_tokens_delta"


def _module_of(key: str) -> str:
    return parameter_of(key).rpartition(".")[0]
