"""Tiny mixtures of experts with LoRA on the experts, which PEFT adds to their parameters."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from tests.data.test_batches import byte_tokenizer
from tests.tiny_models import randomise_b_

N_EXPERTS, N_LAYERS, RANK = 3, 2, 2
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
INPUTS = {"input_ids": torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(5))}
SIZES = dict(
    vocab_size=len(byte_tokenizer()),
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=N_LAYERS,
    num_attention_heads=2,
    num_key_value_heads=2,
    num_local_experts=N_EXPERTS,
    num_experts_per_tok=2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    initializer_range=0.2,
)


def tiny_mixture(family: str = "mixtral") -> PreTrainedModel:
    """gpt-oss has its matrices the other way round, (experts, d_in, d_out), and biases."""
    torch.manual_seed(0)
    if family == "gpt_oss":
        return GptOssForCausalLM(GptOssConfig(**SIZES, head_dim=8, rope_parameters={"rope_type": "default"})).eval()
    return MixtralForCausalLM(MixtralConfig(**SIZES)).eval()


def on_experts(family: str = "mixtral", seed: int = 0, **settings) -> PeftModel:
    chosen = {"target_modules": ["q_proj"], "target_parameters": EXPERTS, "r": RANK, "lora_alpha": 3, **settings}
    torch.manual_seed(seed + 1)
    model = get_peft_model(tiny_mixture(family), LoraConfig(**chosen, task_type="CAUSAL_LM"))
    randomise_b_(model, seed=seed)
    return model.eval()


def wrappers(model) -> dict[str, ParamWrapper]:
    """PEFT's wrappers by the parameter that each has."""
    found = {}
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, ParamWrapper):
            found[f"{name.split('.experts')[0]}.experts.{module.parameter_name}"] = module
    return found


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(**INPUTS).logits
