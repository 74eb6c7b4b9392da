"""Loading: a base model, its tokenizer and an adapter on it."""

from __future__ import annotations

import dataclasses
import inspect
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

from peft import PeftConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorazor.adapter.base import load_base, load_config, load_tokenizer
from lorazor.adapter.beside import beside_lora, check_tokens, fit_vocabulary_, n_rows, replaced_by
from lorazor.adapter.experts import orders_of_parameters, patterns_of_parameters, restore_orders_
from lorazor.adapter.find import base_of, find_adapter
from lorazor.adapter.fingerprint import base_fingerprint
from lorazor.adapter.folder import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterFolder,
    load_tensors,
    read_adapter,
)
from lorazor.adapter.head import name_classes_, names_in, names_of_classes
from lorazor.adapter.offloading import fetch_
from lorazor.adapter.quantization import form_of, other_form
from lorazor.adapter.sites import LiveSite, find_sites, site_parameters, target_modules_of
from lorazor.adapter.tasks import (
    TASK_TYPES,
    Task,
    check_is_trained,
    class_for,
    classes_to_load,
    decoder_inputs,
    prepare_,
    task_of_adapter,
    task_of_base,
)
from lorazor.adapter.translation import is_of_other_version, translated
from lorazor.errors import AdapterError, BaseModelError
from lorazor.settings import ModelSettings

TOKENIZER_FILE = "tokenizer_config.json"


@dataclass(frozen=True)
class Loaded:
    """A model ready to be measured.

    Attributes:
        model: the base model; where an adapter was loaded, its layers are inside. In evaluation mode.
        tokenizer: the adapter's own tokenizer if its folder has one, else the base model's.
        base_tokenizer: gives the base model's, the same one at every call.
        task: what the model does.
        sites: the adapter's sites in execution order; empty without an adapter.
        peft_model: the same model in PEFT's wrapper, None without an adapter.
        untrained: names of the parameters, such as those of a head, that the base model's checkpoint does not have.
        replaced: what the base model has where the adapter brings its own beside LoRA (heads, biases), by name.
        warning: why what is measured may not be what the adapter does elsewhere; see `other_form`.
        n_tokens: rows of the embedding that the base model was loaded with; the adapter may have brought more.
        fingerprint: of the base model as it was loaded; see `base_fingerprint`.
        orders: of the base model's parameters before any adapter was on it; see `orders_of_parameters`.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    base_tokenizer: Callable[[], PreTrainedTokenizerBase]
    task: Task
    sites: list[LiveSite]
    peft_model: PeftModel | None = None
    untrained: tuple[str, ...] = ()
    replaced: Mapping[str, Tensor] = field(default_factory=dict)
    warning: str | None = None
    n_tokens: int | None = None
    fingerprint: str = ""
    orders: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def decoder_inputs(self, labels: Tensor) -> Tensor:
        """What the decoder of an encoder-decoder reads when its answer is given; see `tasks.decoder_inputs`."""
        return decoder_inputs(self.model, labels)

    @property
    def n_classes(self) -> int:
        """Classes of a classifier's head; 1 where it predicts a number."""
        return self.model.config.num_labels or 0

    @property
    def class_names(self) -> dict[int, str]:
        """Names of these classes by their numbers, none where it has none."""
        return names_of_classes(self.model.config)

    @property
    def has_types(self) -> bool:
        """Whether the model reads `token_type_ids`."""
        return "token_type_ids" in inspect.signature(self.model.forward).parameters


def load(
    adapter: str | Path | AdapterFolder | None = None,
    settings: ModelSettings | None = None,
    task: Task | None = None,
    n_labels: int | None = None,
    is_trainable: bool = False,
    modules: Sequence[str] = (),
) -> Loaded:
    """Load an adapter and the base model it belongs to.

    Args:
        adapter: adapter folder, also one that was read, or hub id; None for the base model alone, which
            `settings.model` then names.
        settings: which base model and how to load it; by default the one named in the adapter's config.
        task: what the model is for; by default what the adapter, or else the base model's config says.
        n_labels: classes of a classification head to be trained; an adapter brings its own head.
        is_trainable: load the adapter to train it further.
        modules: without an adapter, those that it is to go on; see `class_for`.
    Raises:
        AdapterError: the adapter folder cannot be used.
        BaseModelError: the base model cannot be loaded, or the adapter does not fit it.
        SettingsError: neither adapter nor model given.
    """
    settings = settings or ModelSettings()
    folder = read_adapter(find_adapter(adapter)) if isinstance(adapter, str | Path) else adapter
    source = base_of(folder, settings)
    config = load_config(source, settings)
    if settings.task != "auto":
        task = task or settings.task
    task = task or (task_of_base(config) if folder is None else task_of_adapter(folder.config, config))
    n_classes = classes_to_load(folder, config, n_labels) if task == "classification" else None
    names = modules if folder is None else [site.name for site in folder.sites]
    model, untrained = load_base(class_for(task, config, names), source, config, task, settings, n_classes)
    own = cache(partial(load_tokenizer, source, settings))
    tokenizer = own() if folder is None else _tokenizer_of(folder) or own()
    prepare_(model, tokenizer, task)
    if folder is not None and task == "classification":
        name_classes_(model.config, names_in(folder))
    fingerprint = base_fingerprint(model, untrained)
    base = Loaded(
        model.eval(), tokenizer, own, task, [], untrained=untrained, n_tokens=n_rows(model), fingerprint=fingerprint,
        orders=orders_of_parameters(model),
    )  # fmt: skip
    if folder is None:
        return base
    check_is_trained(untrained, folder, source)
    if not is_of_other_version(folder):
        return _with_adapter(base, folder, is_trainable)
    with tempfile.TemporaryDirectory(prefix="lorazor-adapter-") as place:
        return _with_adapter(base, translated(folder, model, Path(place)), is_trainable)


def swap(loaded: Loaded, folder: AdapterFolder, is_trainable: bool = False) -> Loaded:
    """Put another adapter on a loaded base model, in the place of the one that is on it.

    Args:
        loaded: a model with or without an adapter, from `load` or `swap`; of no use afterwards.
        folder: the other adapter.
        is_trainable: leave its parameters trainable.
    Raises:
        BaseModelError, AdapterError: see `attach`.
    """
    base = loaded.model
    if loaded.peft_model is not None:
        base = loaded.peft_model.unload()
        vars(base).pop("peft_config", None)
        base.load_state_dict(loaded.replaced, strict=False)  # PEFT leaves trained heads and biases where they are
        base.tie_weights()  # and copies of tied ones
        restore_orders_(base, loaded.orders)
    tokenizer = _tokenizer_of(folder) or loaded.base_tokenizer()  # that of the other adapter may know other tokens
    return _with_adapter(dataclasses.replace(loaded, model=base, tokenizer=tokenizer), folder, is_trainable)


def _with_adapter(base: Loaded, folder: AdapterFolder, is_trainable: bool) -> Loaded:
    """A base model that carries no adapter, with one on it."""
    model = base.model
    fit_vocabulary_(model, folder, base.n_tokens)
    check_tokens(model, folder, base.tokenizer, base.base_tokenizer)
    replaced = replaced_by(model, folder)
    peft_model = attach(model, folder, is_trainable, base.task)
    return dataclasses.replace(
        base,
        model=model.eval(),
        sites=find_sites(peft_model),
        peft_model=peft_model,
        untrained=(),
        replaced=replaced,
        warning=other_form(folder, model.config),
    )


def attach(
    model: PreTrainedModel, folder: AdapterFolder, is_trainable: bool = False, task: Task | None = None
) -> PeftModel:
    """Put the adapter of a folder on a base model, all of it or none.

    Args:
        model: the base model.
        folder: the adapter.
        is_trainable: leave its parameters trainable.
        task: what the model is for, where the adapter may say something else.
    Raises:
        BaseModelError: its names or shapes do not fit the model.
        AdapterError: it has weights for modules that its config does not name, or the other way round.
    """
    advice = (
        f"It was trained on {folder.config.get('base_model_name_or_path')!r}; pass that base model (--model), or the "
        f"task that it was trained for (--task)."
    )
    _check_places(model, folder, advice)
    try:
        with _as_peft_reads_it(folder) as path, patterns_of_parameters():
            config = PeftConfig.from_pretrained(str(path))
            if task is not None and config.task_type != TASK_TYPES[task]:
                config.task_type = None  # PEFT's wrappers of single tasks insist on models for them
            peft_model = PeftModel.from_pretrained(model, path, config=config, is_trainable=is_trainable)
    except (RuntimeError, ValueError, IndexError, KeyError) as error:  # torch on shapes, PEFT on names and tokens
        reason = next((line.strip() for line in str(error).splitlines()[1:] if line.strip()), str(error))
        raise BaseModelError(f"{folder.name!r} does not fit {type(model).__name__}: {reason} {advice}") from error
    sites = find_sites(peft_model)
    fetch_(sites)
    _check_arrived(folder, sites)
    return peft_model


@contextmanager
def _as_peft_reads_it(folder: AdapterFolder) -> Iterator[Path]:
    """The folder itself, or one that has it by names that PEFT knows and as plain LoRA, inside the block."""
    if not folder.wrapped:
        yield folder.path
        return
    with tempfile.TemporaryDirectory(prefix="lorazor-adapter-") as place:
        Path(place, CONFIG_FILE).write_text(json.dumps(folder.config), encoding="utf-8")
        save_file(load_tensors(folder), Path(place, WEIGHTS_FILE), metadata={"format": "pt"})
        yield Path(place)


def without_place(model: PreTrainedModel, folder: AdapterFolder) -> list[str]:
    """The sites of an adapter that a base model has not; one that reads images too may be loaded as its text model."""
    modules, parameters = ({name for name, _ in own} for own in (model.named_modules(), model.named_parameters()))
    return [site.name for site in folder.sites if site.name not in (parameters if site.is_on_parameter else modules)]


def _check_places(model: PreTrainedModel, folder: AdapterFolder, advice: str) -> None:
    """PEFT leaves out what the model has no place for."""
    sites, parameters = without_place(model, folder), model.state_dict()
    others = [name for name in beside_lora(folder) if name not in parameters]
    if strangers := sites or others:
        what = f"{len(sites)} of {len(folder.sites)} sites" if sites else f"{len(others)} trained weights"
        raise BaseModelError(
            f"{what} of {folder.name!r}, such as {strangers[0]!r}, are not in {type(model).__name__}. {advice}"
        )
    on_parameters = {site.name for site in folder.sites if site.is_on_parameter}
    packed = [name for name, one in model.named_parameters() if name in on_parameters and not one.is_floating_point()]
    if packed:
        raise BaseModelError(
            f"{folder.name!r} has LoRA on {packed[0]!r} as a parameter, and the base model is in "
            f"{form_of(model.config)}, where PEFT cannot add to it. Pass the full base model, without --quantization."
        )


def _check_arrived(folder: AdapterFolder, live: Sequence[LiveSite]) -> None:
    """PEFT leaves out weights of modules that the config does not name, and starts at zero what has no weights."""
    sites, names = {site.name for site in folder.sites}, {site.name for site in live}
    is_named = target_modules_of(folder.config)
    if taken := [site.name for site in folder.sites if site.name not in names and is_named(site.name)]:
        raise AdapterError(
            f"PEFT puts no LoRA on {len(taken)} modules that the config of {folder.name!r} names, such as "
            f"{taken[0]!r}: it takes linear maps beside experts for experts. Merge the adapter into its base with the "
            "transformers that it was trained with, or train it again without these modules."
        )
    for odd, what in ((sites - names, "weights but no entry"), (names - sites, "an entry but no weights")):
        if odd:
            raise AdapterError(
                f"{len(odd)} modules, such as {min(odd)!r}, have {what} in {folder.name!r}. "
                f"Let target_modules of its adapter_config.json name the {len(sites)} modules with weights."
            )
    keys = folder.keys
    for site in live:
        shapes = [tuple(one.shape) for one in site_parameters(site.module, site.adapter)]
        if site.is_on_parameter and shapes != [folder.shapes[key] for _, key in sorted(keys[site.name].items())]:
            raise AdapterError(
                f"{folder.name!r} has LoRA on several parameters of one module, and {site.name} is another one in "
                "the base model than its names say. Train one of them at a time."
            )
    zero = [site.name for site in live if any(map(_is_zero, site_parameters(site.module, site.adapter)[:2]))]
    tensors = load_tensors(folder, [key for name in zero for key in keys[name].values()])
    lost = [name for name in zero if not any(map(_is_zero, (tensors[key] for key in keys[name].values())))]
    if lost:  # it renames keys of some models as those of older checkpoints
        raise AdapterError(
            f"PEFT does not load the weights of {len(lost)} modules of {folder.name!r}, such as {lost[0]!r}: it "
            f"takes their names for others. Leave these modules out of target_modules when you train."
        )


def _is_zero(tensor: Tensor) -> bool:
    return not tensor.is_meta and not tensor.any()


def _tokenizer_of(folder: AdapterFolder) -> PreTrainedTokenizerBase | None:
    """The adapter's own tokenizer, if its folder has one."""
    return load_tokenizer(str(folder.path), ModelSettings()) if (folder.path / TOKENIZER_FILE).exists() else None
