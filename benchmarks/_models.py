"""The models and examples that benchmarks run on: yours from disk, or random ones that need no download."""

from __future__ import annotations

import argparse
import dataclasses
import random

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lorazor.adapter.load import Loaded, load
from lorazor.adapter.sites import find_sites
from lorazor.data.examples import Example, read_examples
from lorazor.settings import ModelSettings

RANK = 8
STANDARD_DEVIATION_OF_B = 0.02
"""Of a random adapter: enough to move every loss, too little to drown the model."""


def add_model_arguments(parser: argparse.ArgumentParser, n_examples: int) -> None:
    """The options that say which model, adapter and examples."""
    parser.add_argument("--model", help="base model: hub id or folder")
    parser.add_argument("--gguf-file", help="name of the GGUF file inside the --model folder")
    parser.add_argument("--adapter", help="adapter folder; by default a random one of rank 8 on all linear maps")
    parser.add_argument("--data", help="examples: .jsonl(.xz), .csv, .parquet, a folder or a hub name")
    parser.add_argument("--examples", type=int, default=n_examples, help="use the first so many examples")
    parser.add_argument("--batch-size", type=int, default=8, help="examples per forward pass")
    parser.add_argument("--tiny", action="store_true", help="a small random Llama and random text instead")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything that is random")


def load_model(arguments: argparse.Namespace) -> Loaded:
    """The model that the options ask for, in float32 on the CPU."""
    if arguments.tiny:
        return tiny_llama(seed=arguments.seed)
    settings = ModelSettings(arguments.model, arguments.gguf_file, dtype="float32", device_map="cpu")
    loaded = load(arguments.adapter, settings)
    return loaded if arguments.adapter else with_random_adapter(loaded, arguments.seed)


def read_data(arguments: argparse.Namespace) -> list[Example]:
    """The examples that the options ask for."""
    if arguments.data:
        return read_examples(arguments.data, limit=arguments.examples)
    if arguments.tiny:
        return random_examples(arguments.examples, arguments.seed)
    raise SystemExit("No examples. Pass --data FILE, or --tiny for random ones.")


def tiny_llama(hidden_size: int = 256, n_layers: int = 8, seed: int = 0) -> Loaded:
    """A random Llama with a random adapter and a tokenizer of bytes."""
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=16 * hidden_size,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.05,
    )
    return with_random_adapter(
        Loaded(LlamaForCausalLM(config).eval(), tokenizer, lambda: tokenizer, "causal", []), seed
    )


def with_random_adapter(loaded: Loaded, seed: int = 0) -> Loaded:
    """LoRA on all linear maps of a causal model, with a random B."""
    torch.manual_seed(seed)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    peft_model = get_peft_model(loaded.model, config)
    sites = find_sites(peft_model)
    for site in sites:
        torch.nn.init.normal_(site.module.lora_B[site.adapter].weight, std=STANDARD_DEVIATION_OF_B)
    loaded.model.eval()
    return dataclasses.replace(loaded, sites=sites, peft_model=peft_model)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are bytes, after <pad>, <bos> and <eos>."""
    special = ["<pad>", "<bos>", "<eos>"]
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = dict(zip(("pad_token", "bos_token", "eos_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=1024, **names)


def random_examples(n_examples: int, seed: int = 0) -> list[Example]:
    """Prompts of about 50 letters and answers of about 35: the lengths, in bytes, that E2E has in tokens."""
    source = random.Random(seed)

    def sentence(n_words: int) -> str:
        return " ".join("".join(source.choices("etaoinshrdlu", k=source.randint(2, 8))) for _ in range(n_words))

    pairs = [(sentence(source.randint(6, 10)), " " + sentence(source.randint(4, 7))) for _ in range(n_examples)]
    return [Example(index, prompt, answer, (answer,)) for index, (prompt, answer) in enumerate(pairs)]
