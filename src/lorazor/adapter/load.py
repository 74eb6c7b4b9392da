"""Loading: a base model, its tokenizer and an adapter on it."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lorazor.adapter.beside import beside_lora, fit_vocabulary_, n_rows, replaced_by
from lorazor.adapter.find import base_of, find_adapter
from lorazor.adapter.fingerprint import base_fingerprint
from lorazor.adapter.folder import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterFolder,
    keys_by_site,
    load_tensors,
    read_adapter,
)
from lorazor.adapter.offloading import fetch_
from lorazor.adapter.quantization import FULL, form_of, keep_packing_, other_form, quantizing
from lorazor.adapter.sites import LiveSite, find_sites, site_parameters
from lorazor.adapter.tasks import (
    AUTO_CLASSES,
    TASK_TYPES,
    Task,
    check_is_trained,
    class_for,
    classes_to_load,
    decoder_inputs,
    modules_to_train,
    prepare_,
    task_of_adapter,
    task_of_base,
)
from lorazor.errors import AdapterError, BaseModelError
from lorazor.settings import ModelSettings

TOKENIZER_FILE = "tokenizer_config.json"


@dataclass(frozen=True)
class Loaded:
    """A model ready to be measured.

    Attributes:
        model: the base model; where an adapter was loaded, its layers are inside. In evaluation mode.
        tokenizer: the adapter's own tokenizer if its folder has one, else the base model's.
        task: what the model does.
        sites: the adapter's sites in execution order; empty without an adapter.
        peft_model: the same model in PEFT's wrapper, None without an adapter.
        untrained: names of the parameters, such as those of a head, that the base model's checkpoint does not have.
        replaced: what the base model has where the adapter brings its own beside LoRA (heads, biases), by name.
        warning: why what is measured may not be what the adapter does elsewhere; see `other_form`.
        n_tokens: rows of the embedding that the base model was loaded with; the adapter may have brought more.
        fingerprint: of the base model as it was loaded; see `base_fingerprint`.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: Task
    sites: list[LiveSite]
    peft_model: PeftModel | None = None
    untrained: tuple[str, ...] = ()
    replaced: Mapping[str, Tensor] = field(default_factory=dict)
    warning: str | None = None
    n_tokens: int | None = None
    fingerprint: str = ""

    def decoder_inputs(self, labels: Tensor) -> Tensor:
        """What the decoder of an encoder-decoder reads when its answer is given; see `tasks.decoder_inputs`."""
        return decoder_inputs(self.model, labels)

    @property
    def n_classes(self) -> int:
        """Classes of a classifier's head."""
        return self.model.config.num_labels or 0


def load(
    adapter: str | Path | None = None,
    settings: ModelSettings | None = None,
    task: Task | None = None,
    n_labels: int | None = None,
    is_trainable: bool = False,
    modules: Sequence[str] = (),
) -> Loaded:
    """Load an adapter and the base model it belongs to.

    Args:
        adapter: adapter folder or hub id; None for the base model alone, which `settings.model` then names.
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
    folder = None if adapter is None else read_adapter(find_adapter(adapter))
    source = base_of(folder, settings)
    config = _from_hub(AutoConfig, source, settings)
    if settings.task != "auto":
        task = task or settings.task
    task = task or (task_of_base(config) if folder is None else task_of_adapter(folder.config, config))
    n_classes = classes_to_load(folder, config, n_labels) if task == "classification" else None
    names = modules if folder is None else [site.name for site in folder.sites]
    model, untrained = _load_base(class_for(task, config, names), source, config, task, settings, n_classes)
    tokenizer = load_tokenizer(folder, source, settings)
    prepare_(model, tokenizer, task)
    fingerprint = base_fingerprint(model, untrained)
    base = Loaded(
        model.eval(), tokenizer, task, [], untrained=untrained, n_tokens=n_rows(model), fingerprint=fingerprint
    )
    if folder is None:
        return base
    check_is_trained(untrained, folder, source)
    return _with_adapter(base, folder, is_trainable)


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
    has_tokenizer = (folder.path / TOKENIZER_FILE).exists()
    tokenizer = load_tokenizer(folder, "", ModelSettings()) if has_tokenizer else loaded.tokenizer
    return _with_adapter(dataclasses.replace(loaded, model=base, tokenizer=tokenizer), folder, is_trainable)


def _with_adapter(base: Loaded, folder: AdapterFolder, is_trainable: bool) -> Loaded:
    """A base model that carries no adapter, with one on it."""
    model = base.model
    fit_vocabulary_(model, folder, base.n_tokens)
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
    config = PeftConfig.from_pretrained(str(folder.path))
    if task is not None and config.task_type != TASK_TYPES[task]:
        config.task_type = None  # PEFT's wrappers of single tasks insist on models for them
    try:
        with _as_peft_reads_it(folder) as path:
            peft_model = PeftModel.from_pretrained(model, path, config=config, is_trainable=is_trainable)
    except (RuntimeError, ValueError, IndexError, KeyError) as error:  # torch on shapes, PEFT on names and tokens
        reason = next((line.strip() for line in str(error).splitlines()[1:] if line.strip()), str(error))
        raise BaseModelError(f"{str(folder.path)!r} does not fit {type(model).__name__}: {reason} {advice}") from error
    sites = find_sites(peft_model)
    fetch_(sites)
    _check_arrived(folder, sites)
    return peft_model


@contextmanager
def _as_peft_reads_it(folder: AdapterFolder) -> Iterator[Path]:
    """The folder itself, or one that has its tensors by names that PEFT knows, inside the block."""
    if not folder.wrapped:
        yield folder.path
        return
    with tempfile.TemporaryDirectory(prefix="lorazor-adapter-") as place:
        shutil.copyfile(folder.path / CONFIG_FILE, Path(place, CONFIG_FILE))
        save_file(load_tensors(folder), Path(place, WEIGHTS_FILE), metadata={"format": "pt"})
        yield Path(place)


def _check_places(model: PreTrainedModel, folder: AdapterFolder, advice: str) -> None:
    """PEFT leaves out what the model has no place for."""
    modules, parameters = {name for name, _ in model.named_modules()}, model.state_dict()
    sites = [site.name for site in folder.sites if site.name not in modules]
    others = [name for name in beside_lora(folder) if name not in parameters]
    if strangers := sites or others:
        what = f"{len(sites)} of {len(folder.sites)} sites" if sites else f"{len(others)} trained weights"
        raise BaseModelError(
            f"{what} of {str(folder.path)!r}, such as {strangers[0]!r}, are not in {type(model).__name__}. {advice}"
        )


def _check_arrived(folder: AdapterFolder, live: Sequence[LiveSite]) -> None:
    """PEFT leaves out weights of modules that the config does not name, and starts at zero what has no weights."""
    sites, names = {site.name for site in folder.sites}, {site.name for site in live}
    for odd, what in ((sites - names, "weights but no entry"), (names - sites, "an entry but no weights")):
        if odd:
            raise AdapterError(
                f"{len(odd)} modules, such as {min(odd)!r}, have {what} in {str(folder.path)!r}. "
                f"Let target_modules of its adapter_config.json name the {len(sites)} modules with weights."
            )
    keys = keys_by_site(folder.shapes)
    zero = [site.name for site in live if any(map(_is_zero, site_parameters(site.module, site.adapter)[:2]))]
    tensors = load_tensors(folder, [key for name in zero for key in keys[name].values()])
    lost = [name for name in zero if not any(map(_is_zero, (tensors[key] for key in keys[name].values())))]
    if lost:  # it renames keys of some models as those of older checkpoints
        raise AdapterError(
            f"PEFT does not load the weights of {len(lost)} modules of {str(folder.path)!r}, such as {lost[0]!r}: it "
            f"takes their names for others. Leave these modules out of target_modules when you train."
        )


def _is_zero(tensor: Tensor) -> bool:
    return not tensor.is_meta and not tensor.any()


def task_of_model(settings: ModelSettings) -> Task:
    """What a base model is for, by its config alone.

    Raises:
        BaseModelError: the config cannot be loaded, or its model is for none of the tasks.
    """
    return task_of_base(_from_hub(AutoConfig, base_of(None, settings), settings))


def outline(folder: AdapterFolder, settings: ModelSettings) -> tuple[PreTrainedModel, str]:
    """The base model of an adapter without its weights, on torch's meta device, from its config alone; and its name.

    Raises:
        SettingsError: none is named.
        BaseModelError: its config cannot be loaded.
    """
    source = base_of(folder, settings)
    config = _from_hub(AutoConfig, source, settings)
    task = task_of_adapter(folder.config, config) if settings.task == "auto" else settings.task
    kind = class_for(task, config, [site.name for site in folder.sites])
    try:
        with torch.device("meta"):
            return kind.from_config(config), source
    except (ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BaseModelError(f"The base model {source!r} is not what {kind.__name__} makes: {reason}") from error


def _load_base(
    kind: Any, source: str, config: PreTrainedConfig, task: Task, settings: ModelSettings, n_classes: int | None
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """The base model, and the names of its parameters that the checkpoint does not have at this size."""
    options: dict[str, Any] = {}
    if n_classes is not None:
        options = {"num_labels": n_classes, "ignore_mismatched_sizes": True}
    device_map = settings.device_map or ("cuda" if torch.cuda.is_available() else None)
    on_cpu = device_map in (None, "cpu")
    dtype = ("float32" if on_cpu else "auto") if settings.dtype == "auto" else settings.dtype
    if device_map == "cuda" and "LOCAL_RANK" in os.environ:  # one process per GPU under accelerate launch
        device_map = f"cuda:{os.environ['LOCAL_RANK']}"
    if settings.gguf_file:
        options["quantization_config"] = GgufConfig(dequantize=True)  # plain tensors, which can be trained on
    elif settings.quantization or form_of(config) != FULL:
        options |= quantizing(config, settings.quantization, source, dtype, _head_of(config, task))
    options |= {"dtype": dtype, "device_map": device_map, "output_loading_info": True}
    model, found = _from_hub(kind, source, settings, **options)
    keep_packing_(model)
    return model, (*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"]))


def _head_of(config: PreTrainedConfig, task: Task) -> list[str]:
    """Modules of the head that a task puts on a base model: they are trained, which numbers of 4 bits cannot be."""
    if task not in ("classification", "question-answering"):
        return []
    with torch.device("meta"):
        return modules_to_train(AUTO_CLASSES[task].from_config(config), task, ())


def load_tokenizer(folder: AdapterFolder | None, source: str, settings: ModelSettings) -> PreTrainedTokenizerBase:
    """The adapter's own tokenizer if its folder has one, else that of the base model; it can pad."""
    if folder is not None and (folder.path / TOKENIZER_FILE).exists():
        source, settings = str(folder.path), ModelSettings()
    tokenizer = _from_hub(AutoTokenizer, source, settings)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _from_hub(kind: Any, source: str, settings: ModelSettings, **options: Any) -> Any:
    if settings.gguf_file:
        options["gguf_file"] = settings.gguf_file
    try:
        return kind.from_pretrained(source, **options)
    except (OSError, ValueError, ImportError, RuntimeError, AssertionError) as error:  # the last: no such device
        reason = str(error).strip().splitlines()[0]
        if reason.startswith("Unrecognized configuration class"):  # and then all those that it knows
            raise BaseModelError(
                f"The base model {source!r} has no form that {kind.__name__} loads: it has another task (--task), or "
                f"reads more than text. Pass another base model."
            ) from error
        advice = "" if isinstance(error, ImportError) else " Pass a hub id or a folder."  # it says what is to do
        raise BaseModelError(f"Cannot load the base model {source!r}: {reason}{advice}") from error
