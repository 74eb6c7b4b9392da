"""Loading: a base model, its tokenizer and an adapter on it."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lorazor.adapter.folder import AdapterFolder, read_adapter
from lorazor.adapter.sites import LiveSite, find_sites
from lorazor.errors import AdapterError, BaseModelError, SettingsError
from lorazor.settings import ModelSettings

Task = Literal["causal", "seq2seq", "classification", "question-answering"]

_AUTO_CLASSES = {
    "causal": AutoModelForCausalLM,
    "seq2seq": AutoModelForSeq2SeqLM,
    "classification": AutoModelForSequenceClassification,
    "question-answering": AutoModelForQuestionAnswering,
}
# PEFT's names of the tasks
TASK_TYPES: dict[Task, str] = {
    "causal": "CAUSAL_LM",
    "seq2seq": "SEQ_2_SEQ_LM",
    "classification": "SEQ_CLS",
    "question-answering": "QUESTION_ANS",
}
_TASKS: dict[str | None, Task] = {name: task for task, name in TASK_TYPES.items()}
_HEADS = ("classifier.weight", "score.weight", "classifier.out_proj.weight")


@dataclass(frozen=True)
class Loaded:
    """A model ready to be measured.

    Attributes:
        model: the base model; where an adapter was loaded, its layers are inside. In evaluation mode.
        tokenizer: the adapter's own tokenizer if its folder has one, else the base model's.
        task: what the model does.
        sites: the adapter's sites in execution order; empty without an adapter.
        peft_model: the same model in PEFT's wrapper, None without an adapter.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: Task
    sites: list[LiveSite]
    peft_model: PeftModel | None = None


def load(
    adapter: str | Path | None = None,
    settings: ModelSettings | None = None,
    task: Task | None = None,
    n_labels: int | None = None,
    is_trainable: bool = False,
) -> Loaded:
    """Load an adapter and the base model it belongs to.

    Args:
        adapter: adapter folder or hub id; None for the base model alone, which `settings.model` then names.
        settings: which base model and how to load it; by default the one named in the adapter's config.
        task: what the model is for; by default what the adapter, or else the base model's config says.
        n_labels: classes of a classification head to be trained; an adapter brings its own head.
        is_trainable: load the adapter to train it further.
    Raises:
        AdapterError: the adapter folder cannot be used.
        BaseModelError: the base model cannot be loaded, or the adapter does not fit it.
        SettingsError: neither adapter nor model given.
    """
    settings = settings or ModelSettings()
    folder = None if adapter is None else read_adapter(find_adapter(adapter))
    source = settings.model or (folder and folder.config.get("base_model_name_or_path"))
    if not source:
        raise SettingsError("No base model: the adapter's config names none. Pass one (--model, a hub id or a folder).")
    task = task or _task_of(folder, source, settings)
    options: dict[str, Any] = {} if n_labels is None else {"num_labels": n_labels}
    if folder is not None and task == "classification":
        options["num_labels"] = _count_labels(folder)
    model = _load_base(source, task, settings, options)
    tokenizer = _load_tokenizer(folder, source, settings)
    if folder is None:
        return Loaded(model.eval(), tokenizer, task, [])
    peft_model = attach(model, folder, is_trainable)
    return Loaded(model.eval(), tokenizer, task, find_sites(peft_model), peft_model)


def attach(model: PreTrainedModel, folder: AdapterFolder, is_trainable: bool = False) -> PeftModel:
    """Put the adapter of a folder on a base model.

    Args:
        model: the base model.
        folder: the adapter.
        is_trainable: leave its parameters trainable.
    Raises:
        BaseModelError: its names or shapes do not fit the model.
    """
    advice = f"It was trained on {folder.config.get('base_model_name_or_path')!r}; pass that base model (--model)."
    modules = {name for name, _ in model.named_modules()}
    strangers = [site.name for site in folder.sites if site.name not in modules]
    if strangers:
        raise BaseModelError(
            f"{len(strangers)} of {len(folder.sites)} sites of {str(folder.path)!r}, such as {strangers[0]!r}, "
            f"are not in {type(model).__name__}. {advice}"
        )
    try:
        return PeftModel.from_pretrained(model, folder.path, is_trainable=is_trainable)
    except (RuntimeError, ValueError) as error:  # torch on shapes, PEFT on names
        reason = next((line.strip() for line in str(error).splitlines()[1:] if line.strip()), str(error))
        raise BaseModelError(f"{str(folder.path)!r} does not fit {type(model).__name__}: {reason} {advice}") from error


def find_adapter(adapter: str | Path) -> Path:
    """The local folder of an adapter: the folder itself, or the download of a hub id.

    Raises:
        AdapterError: neither a folder nor a hub id that can be reached.
    """
    path = Path(adapter)
    if path.is_dir() or not _looks_like_hub_id(str(adapter)):
        return path
    try:
        return Path(
            snapshot_download(str(adapter), allow_patterns=["adapter_*", "*.json", "*.md", "*.jinja", "*.model"])
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise AdapterError(
            f"{str(adapter)!r} is neither an adapter folder nor a hub id that can be reached."
        ) from error


def _looks_like_hub_id(text: str) -> bool:
    return text.count("/") == 1 and not text.startswith((".", "/", "~")) and "\\" not in text


def _task_of(folder: AdapterFolder | None, source: str, settings: ModelSettings) -> Task:
    task_type = folder.config.get("task_type") if folder else None
    if task_type in _TASKS:
        return _TASKS[task_type]
    return task_of_model(dataclasses.replace(settings, model=source))


def task_of_model(settings: ModelSettings) -> Task:
    """What a base model is for, by its config alone.

    Raises:
        BaseModelError: the config cannot be loaded.
    """
    config = _from_hub(AutoConfig, str(settings.model), settings)
    if config.is_encoder_decoder:
        return "seq2seq"
    architecture = (config.architectures or [""])[0]
    if architecture.endswith("ForQuestionAnswering"):
        return "question-answering"
    return "classification" if architecture.endswith("ForSequenceClassification") else "causal"


def _count_labels(folder: AdapterFolder) -> int:
    """Classes of the trained head, which the adapter folder carries along."""
    heads = [shape for key, shape in folder.shapes.items() if key.endswith(_HEADS) and "lora_" not in key]
    if not heads:
        raise AdapterError(
            f"{str(folder.path)!r} is a classification adapter without a trained head (modules_to_save)."
        )
    return heads[-1][0]


def _load_base(source: str, task: Task, settings: ModelSettings, options: dict[str, Any]) -> PreTrainedModel:
    device_map = settings.device_map or ("cuda" if torch.cuda.is_available() else None)
    on_cpu = device_map in (None, "cpu")
    dtype = ("float32" if on_cpu else "auto") if settings.dtype == "auto" else settings.dtype
    if device_map == "cuda" and "LOCAL_RANK" in os.environ:  # one process per GPU under accelerate launch
        device_map = f"cuda:{os.environ['LOCAL_RANK']}"
    if settings.gguf_file:
        options["quantization_config"] = GgufConfig(dequantize=True)  # plain tensors, which can be trained on
    return _from_hub(_AUTO_CLASSES[task], source, settings, dtype=dtype, device_map=device_map, **options)


def _load_tokenizer(folder: AdapterFolder | None, source: str, settings: ModelSettings) -> PreTrainedTokenizerBase:
    if folder is not None and (folder.path / "tokenizer_config.json").exists():
        tokenizer = _from_hub(AutoTokenizer, str(folder.path), ModelSettings())
    else:
        tokenizer = _from_hub(AutoTokenizer, source, settings)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _from_hub(kind: Any, source: str, settings: ModelSettings, **options: Any) -> Any:
    if settings.gguf_file:
        options["gguf_file"] = settings.gguf_file
    try:
        return kind.from_pretrained(source, **options)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BaseModelError(f"Cannot load the base model {source!r}: {reason} Pass a hub id or a folder.") from error
