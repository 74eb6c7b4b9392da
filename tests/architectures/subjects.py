"""What is put through the checks: a tiny model with LoRA on every linear map, a batch, and both on disk."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from lorazor.data.batches import IGNORED, Batch
from lorazor.data.examples import Example
from tests.architectures.tiny_configs import N_LABELS, VOCABULARY, tiny_model
from tests.tiny_models import randomise_b_

N_ROWS, N_TOKENS = 2, 8
RANK = 2
FIRST_WORD = 3  # below are padding, beginning and end
TASK_TYPES = {
    **dict.fromkeys(("causal", "image-text", "experts"), "CAUSAL_LM"),
    "seq2seq": "SEQ_2_SEQ_LM",
    "classification": "SEQ_CLS",
}
# Where PEFT cannot put LoRA on all linear maps, these are left out: experts, routers, Mamba's outputs, trained heads.
LEFT_OUT = re.compile(r"mlp|moe|expert|feed_forward|router|gate|out_proj|conv1d|o_a_proj|classifier")


@dataclass
class Subject:
    """One family on trial.

    Attributes:
        task: `causal`, `seq2seq` or `classification`.
        family: transformers' name of the model type.
        model: the tiny model with a random adapter, in evaluation mode.
        base_state: the weights of the base model.
        batch: two rows without padding.
        base_folder: the base model on disk.
        adapter_folder: the adapter on disk, as PEFT wrote it, with a tokenizer.
        remarks: what had to be done differently for this family.
    """

    task: str
    family: str
    model: PeftModel
    base_state: dict[str, Tensor]
    batch: Batch
    base_folder: Path
    adapter_folder: Path
    remarks: list[str]

    @property
    def does(self) -> str:
        """Its task, but `causal` for decoders that hear or see, which transformers files under other names."""
        is_decoder = self.task == "seq2seq" and not self.model.config.is_encoder_decoder
        return "causal" if is_decoder or self.task in ("image-text", "experts") else self.task

    def fresh_base(self) -> PreTrainedModel:
        """The base model once more, without the adapter and without a file in between."""
        model = tiny_model(self.task, self.family)
        model.load_state_dict(self.base_state)
        return model


def tiny_batch(task: str, model: PreTrainedModel) -> Batch:
    """Random tokens, the end of sequence last where a text is classified, and the last few as answers."""
    generator = torch.Generator().manual_seed(1)

    def words() -> Tensor:
        return torch.randint(FIRST_WORD, VOCABULARY, (N_ROWS, N_TOKENS), generator=generator)

    tokens = words()
    if task == "classification":
        tokens[:, -1] = 2
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if task == "classification":
        return Batch((0, 1), inputs, torch.randint(0, N_LABELS, (N_ROWS,), generator=generator))
    if task == "seq2seq" and model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = words()
    targets = words()
    targets[:, :4] = IGNORED
    targets[0, 6:] = IGNORED
    return Batch((0, 1), inputs, targets)


def one_row(batch: Batch, row: int) -> Batch:
    """A row of a batch by itself."""
    inputs = {name: tensor[row : row + 1] for name, tensor in batch.inputs.items()}
    return Batch((batch.indices[row],), inputs, batch.targets[row : row + 1])


def losses_by_hand(model: nn.Module, batch: Batch) -> Tensor:
    """Negative log-likelihood of the answers of each row, (rows,), from all logits."""
    log_probabilities = model(**batch.inputs).logits.float().log_softmax(dim=-1)
    targets = batch.targets
    nll = -log_probabilities.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return torch.where(targets == IGNORED, torch.zeros_like(nll), nll).reshape(len(targets), -1).sum(dim=1)


def lora_factors(model: PeftModel) -> dict[str, Tensor]:
    """B of every site, (d_out, r) or (d_out, r, experts), by the site's name in the base model."""
    found = {}
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, ParamWrapper):
            B = module.lora_B["default"].weight
            found[f"{name.replace('.base_layer', '')}.{module.parameter_name}"] = B.view(len(B), -1, module.num_experts)
        elif isinstance(module, LoraLayer) and module.lora_B:
            found[name] = module.lora_B["default"].weight
    return found


@contextmanager
def columns_scaled(model: PeftModel, factors: Mapping[str, Tensor | float]) -> Iterator[None]:
    """Multiply the columns of B of some sites inside the block."""
    chosen = {name: B for name, B in lora_factors(model).items() if name in factors}
    before = {name: B.detach().clone() for name, B in chosen.items()}
    try:
        for name, B in chosen.items():
            factor = torch.as_tensor(factors[name])
            B.data.mul_(factor[:, None] if B.ndim == 3 and factor.ndim else factor)
        yield
    finally:
        for name, B in chosen.items():
            B.data.copy_(before[name])


def make_subject(task: str, family: str, folder: Path) -> Subject:
    """Build a family, put LoRA on it, and save both."""
    base = tiny_model(task, family)
    batch = tiny_batch(task, base)
    remarks: list[str] = []
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    base.save_pretrained(folder / "base")
    model = _with_lora(task, family, base, batch, remarks)
    _let_the_adapter_matter_(model, batch)
    model.save_pretrained(folder / "adapter")
    subject = Subject(task, family, model, state, batch, folder / "base", folder / "adapter", remarks)
    tiny_tokenizer(subject.does).save_pretrained(folder / "adapter")
    return subject


def _with_lora(task: str, family: str, base: PreTrainedModel, batch: Batch, remarks: list[str]) -> PeftModel:
    """LoRA on all linear maps; on fewer where PEFT refuses some, breaks them, or targets parameters instead.

    Of mixtures of experts, on these parameters, as PEFT chooses them, or else on all that hold experts.
    """
    names = {name for name, module in base.named_modules() if type(module) in (nn.Linear, Conv1D)}
    head = base.get_output_embeddings()
    fewer = sorted(name for name in names if not LEFT_OUT.search(name) and base.get_submodule(name) is not head)
    try:
        model = _wrapped(base, task, "all-linear")
        losses_by_hand(model, batch)
        has_parameters = bool(model.peft_config["default"].target_parameters)
        reason = "PEFT turns it into LoRA on parameters" if has_parameters else None
        if task == "experts":
            reason = None if has_parameters else "PEFT leaves experts out"
    except Exception as error:
        model, reason = None, f"PEFT fails, {in_words(error)}"
    if reason is None and model is not None:
        return model
    if task == "experts":
        remarks.append(f"LoRA on experts by target_parameters; with 'all-linear', {reason}")
        experts = [name for name, one in base.named_parameters() if one.ndim == 3 and "expert" in name]
        others = re.findall(r"^.*mlp\.(?:input|output)_linear\.weight$", "\n".join(base.state_dict()), re.MULTILINE)
        return _wrapped(tiny_model(task, family), task, fewer, experts + others)
    remarks.append(f"LoRA on fewer linear maps; on all, {reason}")
    return _wrapped(tiny_model(task, family), task, fewer)


def _wrapped(
    base: PreTrainedModel, task: str, targets: str | list[str], parameters: list[str] | None = None
) -> PeftModel:
    is_decoder = task == "seq2seq" and not base.config.is_encoder_decoder
    task_type = TASK_TYPES["causal" if is_decoder else task]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = LoraConfig(
            r=RANK, lora_alpha=2 * RANK, task_type=task_type, target_modules=targets, target_parameters=parameters
        )
        return get_peft_model(base, config).eval()  # pyright: ignore[reportReturnType]


@torch.no_grad()
def _let_the_adapter_matter_(model: PeftModel, batch: Batch) -> None:
    """Random B, larger where a model shrinks what LoRA does; and a head that is not the one of the base model."""
    generator = torch.Generator().manual_seed(9)
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    randomise_b_(model)
    for _ in range(4):
        full = losses_by_hand(model, batch)
        with columns_scaled(model, dict.fromkeys(lora_factors(model), 0.0)):
            without = losses_by_hand(model, batch)
        if (full - without).abs().max() > 0.02:
            return
        for B in lora_factors(model).values():
            B.data.mul_(3)
    raise AssertionError("the adapter changes nothing")


def in_words(error: Exception) -> str:
    """What an error says, without what changes from run to run: folders, and the order of sets."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.sub(r"'?[^\s']*/(adapter|base|pruned)'?", r"\1", text)
    text = re.sub(r"\{.*?\}|\[.*?\]|\(model_type=.*?\)|<class .*?>", "…", text)
    return re.split(r"(?<=[.;]) ", text)[0][:160] if len(text) > 160 else text


def tiny_tokenizer(task: str) -> PreTrainedTokenizerFast:
    """A word is a token; texts that an encoder reads end with the end of sequence."""
    special = ["<pad>", "<bos>", "<eos>"]
    words = [*special, *(f"w{index}" for index in range(FIRST_WORD, VOCABULARY))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if task != "causal":
        tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 2)])
    names = dict(zip(("pad_token", "bos_token", "eos_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=32, **names)


def tiny_examples(task: str) -> list[Example]:
    """Two examples of different length."""
    texts = ["w5 w9 w13", "w7 w11 w4 w30 w21"]
    if task == "classification":
        return [Example(row, text, "", (), label=row + 1) for row, text in enumerate(texts)]
    return [Example(row, text, " w8 w9", ("w8 w9",)) for row, text in enumerate(texts)]
