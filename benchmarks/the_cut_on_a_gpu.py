"""What a training step takes, and its peak of memory, before and after the cut: a Llama shaped as 8B, bf16 and 4 bits.

transformers' Trainer trains LoRA of rank 8 on all linear maps, three times on each base: stock, and with WeightLora by
site and by direction, which cuts to an eighth of the parameters half way. The last step of each half is for the peak
(on CUDA `max_memory_allocated`, with the base and the optimizer's state in it); the others are timed, but the first.
Before the cut by site all gates are there; before that by direction the rows of the last steps are watched.

The weights are random: what they are costs no time. A file of them (16 GB) is written for the base in 4 bits, which
bitsandbytes packs while it is read. It takes under 10 minutes on a card of 40 GB or more.

    python benchmarks/the_cut_on_a_gpu.py [--model FOLDER] [--work FOLDER]
    python benchmarks/the_cut_on_a_gpu.py --tiny --device cpu                  to see the script work
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _machine import record, say
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from lorazor.adapter.quantization import keep_packing_
from lorazor.adapter.sites import find_sites
from lorazor.measure.peak import counting_peak
from lorazor.train.callback import WeightLora

LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
TINY = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
RANK, SHARE = 8, 0.125


def main() -> None:
    arguments = _arguments()
    with tempfile.TemporaryDirectory(dir=arguments.work) as place:
        folder = Path(arguments.model or place)
        if not arguments.model:
            write_random(folder, arguments)
        found = {base: measure(base, folder, arguments) for base in ("bf16", "nf4")}
    shape = {"rows": arguments.batch_size, "tokens": arguments.tokens, "rank": RANK, "share": SHARE}
    on = torch.cuda.get_device_name() if arguments.device == "cuda" else arguments.device
    record({"model": arguments.model or "random Llama", "device": on, **shape, "bases": found}, arguments.out)


def write_random(folder: Path, arguments: argparse.Namespace) -> None:
    say("writing random weights")
    torch.manual_seed(0)
    config = LlamaConfig(**TINY if arguments.tiny else LLAMA_8B)
    with torch.device(arguments.device):
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def measure(base: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds and peaks of the three trainings on one base, and their ratios to stock LoRA's first half."""
    n_warmup = arguments.steps // 2
    found: dict[str, Any] = {}
    for way in ("stock", "by site", "by direction"):
        gc.collect()
        if arguments.device == "cuda":
            torch.cuda.empty_cache()
        say(f"{base}, {way}")
        torch.manual_seed(0)
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(load_base(base, folder, arguments), config)
        n_numbers = sum(site.n_parameters for site in find_sites(model))
        stopwatch = Stopwatch({n_warmup, arguments.steps})
        by = "direction" if way == "by direction" else "site"
        cut = [] if way == "stock" else [WeightLora(params=int(SHARE * n_numbers), select_steps=n_warmup, by=by)]
        train(model, [*cut, stopwatch], arguments)
        found[way] = {"before": stopwatch.of(1, n_warmup), "after": stopwatch.of(n_warmup + 1, arguments.steps)}
        found[way] |= {"n_sites": len(find_sites(model)), "n_parameters": model.get_nb_trainable_parameters()[0]}
        del model, cut, stopwatch
    stock = found["stock"]["before"]
    for half in (one[name] for one in found.values() for name in ("before", "after")):
        half |= {f"{what}_ratio": half[what] / stock[what] for what in ("seconds", "peak_bytes")}
    return found


def load_base(base: str, folder: Path, arguments: argparse.Namespace) -> PreTrainedModel:
    packing = None
    if base == "nf4":
        kind = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
        packing = BitsAndBytesConfig(load_in_4bit=True, **kind)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=packing, device_map={"": arguments.device}
    )
    if packing and arguments.device == "cpu":
        keep_packing_(model)
    return model


class Rows(Dataset):
    """Random tokens."""

    def __init__(self, n_rows: int, n_tokens: int, vocabulary: int) -> None:
        self.tokens = torch.randint(vocabulary, (n_rows, n_tokens), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


class Stopwatch(TrainerCallback):
    """Seconds of every step, the optimizer's in them, or the peak of memory of those that are named."""

    def __init__(self, of_peak: set[int]) -> None:
        self.of_peak, self.seconds, self.peaks = of_peak, {}, {}

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step + 1 in self.of_peak:
            self.counting = counting_peak(model)
            self.count = self.counting.__enter__()
        self.start = now()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step in self.of_peak:
            self.peaks[state.global_step] = self.count()
            self.counting.__exit__(None, None, None)
        else:
            self.seconds[state.global_step] = now() - self.start

    def of(self, first: int, last: int) -> dict[str, float]:
        """The median of all steps but the first, and the peak of the last."""
        times = [self.seconds[step] for step in range(first + 1, last)]
        return {"seconds": median(times), "fastest": min(times), "slowest": max(times), "peak_bytes": self.peaks[last]}


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def train(model: Any, callbacks: list[TrainerCallback], arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as place:
        settings = TrainingArguments(
            place,
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.batch_size,
            bf16=True,
            use_cpu=arguments.device == "cpu",
            learning_rate=1e-4,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
        )
        n_rows = arguments.steps * arguments.batch_size
        rows = Rows(n_rows, arguments.tokens, model.config.vocab_size)
        Trainer(model, settings, train_dataset=rows, callbacks=callbacks).train()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", help="base model: hub id or folder; by default a random Llama")
    parser.add_argument("--work", type=Path, help="a folder for the random weights; by default that of temporary files")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--batch-size", type=int, default=2, help="rows of a step")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of a row")
    parser.add_argument("--steps", type=int, default=32, help="of every training; the cut is half way")
    parser.add_argument("--tiny", action="store_true", help="a small model and short rows, to see the script work")
    parser.add_argument("--out", type=Path, help="also write the result to this file")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device. Pass --tiny --device cpu to see the script work.")
    if arguments.steps < 8:
        parser.error(
            f"--steps {arguments.steps}: a half has a first step, two to time and one for the peak. Pass 8 or more."
        )
    if arguments.tiny:
        arguments.tokens = 64
    return arguments


if __name__ == "__main__":
    main()
