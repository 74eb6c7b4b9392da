"""What a tiny model of a family needs beside small sizes; a nested dictionary belongs to a nested config."""

from __future__ import annotations

from typing import Any

_LATENT_ATTENTION = {"num_key_value_heads": 4}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2}

OVERRIDES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ["axk1", "axk2", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"],
        _LATENT_ATTENTION,
    ),
    **dict.fromkeys(["glm_moe_dsa", "minicpm3", "youtu", "dots3_note_text", "mistral4", "longcat_flash"], _LATENT_ATTENTION),
    **dict.fromkeys(["bamba", "granitemoehybrid"], _MAMBA),
    **dict.fromkeys(["codegen", "gptj"], {"rotary_dim": 4}),
    **dict.fromkeys(["hunyuan_v1_dense", "hunyuan_v1_moe", "ministral", "nemotron"], {"head_dim": 8}),
    "mamba2": {"num_heads": 8, "head_dim": 8},
}
