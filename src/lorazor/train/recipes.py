"""A selection told in the settings of other trainers: PEFT, Axolotl, LLaMA-Factory, Unsloth.

A recipe starts a fresh training of the kept sites and of no other. What a trainer cannot say exactly is an error here,
never a recipe that trains other sites. What is said below of each trainer was read in the code of the versions that
`docs/guides/other-trainers.md` names.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Literal, get_args

from lorazor.errors import SelectionError, SettingsError
from lorazor.naming import exact_keys, exact_targets
from lorazor.selection import Selection

Style = Literal["peft", "axolotl", "llama-factory", "unsloth"]

# Parts of a multimodal model in which LLaMA-Factory puts no LoRA by default, in the words of its model table.
_FROZEN_BY_LLAMA_FACTORY = re.compile(r"vision|visual|audio|projector|merger|resampler|mlp_AR|\b[va]pm\b")
# Unsloth's loss reads these weights without calling the module, so that LoRA on them would not be trained.
_NO_LORA_IN_UNSLOTH = ("lm_head", "embed_tokens")


@dataclass(frozen=True)
class _Settings:
    """What a trainer has to be told.

    Attributes:
        names: the kept modules, in execution order.
        parameters: the kept parameters, such as experts.
        dropped: the other sites of the selection.
        is_mixture: whether sites of the selection are parameters, dropped ones too.
        rank: r, the largest rank of the kept sites.
        rank_pattern: the ranks that differ from it, by a regular expression for one site each.
        alpha: lora_alpha of the sites of that rank.
        alpha_pattern: lora_alpha of the others, likewise.
        dropout: probability before A.
        use_rslora: scale by alpha / sqrt(r).
    """

    names: tuple[str, ...]
    parameters: tuple[str, ...]
    dropped: tuple[str, ...]
    is_mixture: bool
    rank: int
    rank_pattern: Mapping[str, int]
    alpha: float
    alpha_pattern: Mapping[str, float]
    dropout: float
    use_rslora: bool


def recipe(
    selection: Selection,
    style: Style,
    alpha: float,
    dropout: float = 0.0,
    use_rslora: bool = False,
    rank: int | None = None,
) -> str:
    """Write the settings with which a trainer puts LoRA on the kept sites and on no other.

    All sites are scaled by alpha / r, with r the largest rank, as in the selection run; with `use_rslora` each by
    alpha / sqrt(r) of its own. The weights of the selection play no part: they belong to the B that the selection run
    trained. Modules that the selection does not list are unknown here: choose among all modules that could carry LoRA.

    Args:
        selection: which sites stay, and at which rank.
        style: the trainer: `peft`, `axolotl`, `llama-factory` or `unsloth`.
        alpha: lora_alpha at the largest rank, above 0; a whole number for Axolotl and LLaMA-Factory.
        dropout: lora_dropout, a probability in [0, 1); 0 where kept sites are parameters.
        use_rslora: scale by alpha / sqrt(r) instead of alpha / r.
        rank: r of all sites; None leaves each site the rank in the selection.
    Returns:
        Python source (`peft`, `unsloth`) or a piece of a YAML file (`axolotl`, `llama-factory`); ends in a newline.
    Raises:
        SettingsError: an unknown style, or a number that is out of range or that the trainer does not take.
        SelectionError: no site stays, or the trainer cannot be told exactly these sites and ranks.
    """
    if style not in get_args(Style):
        raise SettingsError(f"style={style!r} is not known. Pass one of: {', '.join(get_args(Style))}.")
    return _WRITERS[style](_settings(selection, alpha, dropout, use_rslora, rank))


def _settings(selection: Selection, alpha: float, dropout: float, use_rslora: bool, rank: int | None) -> _Settings:
    """What a trainer has to be told, checked."""
    if not (math.isfinite(alpha) and alpha > 0):
        raise SettingsError(f"alpha={alpha}, but it must be a finite number above 0. Twice the rank is a usual choice.")
    if not 0 <= dropout < 1:
        raise SettingsError(f"dropout={dropout}, but it is a probability. Pass 0 (none) or more, and less than 1.")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, Integral) or rank < 1):
        raise SettingsError(
            f"rank={rank}, but a rank is a whole number from 1. Leave it out to keep the present ranks."
        )
    if not selection.kept:
        raise SelectionError(
            f"The selection keeps none of its {len(selection.sites)} sites, so nothing would train. Keep at least 1."
        )
    kept = sorted(selection.kept, key=lambda site: (site.stack is None, site.stack or "", site.layer or 0, site.name))
    ranks = {site.name: site.kept_rank if rank is None else int(rank) for site in kept}
    parameters = tuple(site.name for site in kept if site.is_on_parameter)
    if parameters and dropout:
        raise SettingsError(f"dropout={dropout}, but {parameters[0]!r} is a parameter, where PEFT has none. Pass 0.")
    largest, keys = max(ranks.values()), exact_keys(ranks)
    rank_pattern = {keys[name]: r for name, r in ranks.items() if r != largest}
    return _Settings(
        names=tuple(site.name for site in kept if not site.is_on_parameter),
        parameters=parameters,
        dropped=tuple(site.name for site in selection.dropped),
        is_mixture=any(site.is_on_parameter for site in selection.sites),
        rank=largest,
        rank_pattern=rank_pattern,
        alpha=float(alpha),
        alpha_pattern={} if use_rslora else {key: float(alpha) * r / largest for key, r in rank_pattern.items()},
        dropout=float(dropout),
        use_rslora=bool(use_rslora),
    )


def _target_modules(settings: _Settings) -> list[str] | str:
    if settings.is_mixture:  # PEFT has no regular expressions for parameters, and makes ends of names of one there
        _refuse_side_catch(settings, _is_end, "ends of names in mixtures", others="")
    return exact_targets(settings.names, settings.dropped)


def _write_peft(settings: _Settings) -> str:
    arguments = _python_arguments(settings, _target_modules(settings))
    return f"from peft import LoraConfig\n\npeft_config = LoraConfig(\n{arguments})\n"


def _write_axolotl(settings: _Settings) -> str:
    targets = _target_modules(settings)
    lines = [
        "adapter: lora",
        f"lora_r: {settings.rank}",
        f"lora_alpha: {_whole_alpha(settings.alpha, 'Axolotl')}",
        f"lora_dropout: {_number(settings.dropout)}",
        "lora_target_linear: false",  # true, as in many of its examples, adds every linear module
    ]
    if isinstance(targets, str):
        lines.append(f"lora_target_modules: {_yaml_text(targets)}")
    elif targets:
        lines += ["lora_target_modules:", *(f"  - {_yaml_text(name)}" for name in targets)]
    if settings.parameters:
        lines += ["lora_target_parameters:", *(f"  - {_yaml_text(name)}" for name in settings.parameters)]
    if settings.use_rslora:
        lines.append("peft_use_rslora: true")
    if settings.rank_pattern:
        lines.append("# Axolotl 0.17 and older ignore this and train all sites at lora_r.")
        lines.append("lora_rank_pattern:")
        lines += [f"  {_yaml_text(key)}: {rank}" for key, rank in settings.rank_pattern.items()]
    if settings.alpha_pattern:
        lines.append("lora_alpha_pattern:")
        alphas = {key: _whole_alpha(alpha, "Axolotl") for key, alpha in settings.alpha_pattern.items()}
        lines += [f"  {_yaml_text(key)}: {alpha}" for key, alpha in alphas.items()]
    return "\n".join(lines) + "\n"


def _write_llama_factory(settings: _Settings) -> str:
    names = settings.names
    _refuse_parameters(settings, "LLaMA-Factory has no setting for LoRA on parameters")
    if settings.rank_pattern:
        ranks = sorted({settings.rank, *settings.rank_pattern.values()})
        raise SelectionError(
            f"The kept sites have ranks {', '.join(map(str, ranks))}, but LLaMA-Factory has one lora_rank for all. "
            f"Choose one rank (rank={settings.rank}), or another style."
        )
    if commas := [name for name in names if "," in name]:
        raise SelectionError(
            f"LLaMA-Factory splits lora_target at commas, and the name of {commas[0]!r} has one. Choose another style."
        )
    # It passes the names to PEFT, which compares ends of names; in multimodal models it takes any module whose name
    # contains one of them. The second covers the first.
    _refuse_side_catch(settings, lambda name, dropped: name in dropped, "parts of names")
    lines = [
        "finetuning_type: lora",
        f"lora_rank: {settings.rank}",
        f"lora_alpha: {_whole_alpha(settings.alpha, 'LLaMA-Factory')}",
        f"lora_dropout: {_number(settings.dropout)}",
    ]
    if settings.use_rslora:
        lines.append("use_rslora: true")
    if any(_FROZEN_BY_LLAMA_FACTORY.search(name) for name in names):
        lines.append("# Some sites are in parts of a multimodal model that otherwise get no LoRA.")
        lines += ["freeze_vision_tower: false", "freeze_multi_modal_projector: false"]
    separator = ",\n  "
    lines += ["lora_target: >-", f"  {separator.join(names)}"]
    return "\n".join(lines) + "\n"


def _write_unsloth(settings: _Settings) -> str:
    _refuse_parameters(settings, "Unsloth changes target_parameters of mixtures by rules of its own")
    if heads := [name for name in settings.names if name.rpartition(".")[2] in _NO_LORA_IN_UNSLOTH]:
        raise SelectionError(
            f"Unsloth trains no LoRA on {heads[0]!r}: depending on its version, it trains the whole matrix or "
            f"nothing. Drop the site, or choose another style."
        )
    # Names and not a regular expression: versions until 2026.10 read that letter by letter, and newer ones may add the
    # experts of a mixture-of-experts model to one that mentions `mlp`.
    _refuse_side_catch(settings, _is_end, "ends of names")
    comment = "# FastModel instead of FastLanguageModel, if that loaded the model.\n"
    arguments = _python_arguments(settings, list(settings.names))
    return f"{comment}model = FastLanguageModel.get_peft_model(\n    model,\n{arguments})\n"


_WRITERS: dict[str, Callable[[_Settings], str]] = {
    "peft": _write_peft,
    "axolotl": _write_axolotl,
    "llama-factory": _write_llama_factory,
    "unsloth": _write_unsloth,
}


def _refuse_parameters(settings: _Settings, why: str) -> None:
    if settings.parameters:
        raise SelectionError(
            f"{why}, and {len(settings.parameters)} of the kept sites are parameters, such as "
            f"{settings.parameters[0]!r}. Choose style 'peft' or 'axolotl'."
        )


def _is_end(name: str, dropped: str) -> bool:
    return dropped.endswith(f".{name}")


def _refuse_side_catch(
    settings: _Settings,
    catches: Callable[[str, str], bool],
    compared: str,
    others: str = ", or choose style 'peft' or 'axolotl'",
) -> None:
    for name in (*settings.names, *settings.parameters):
        for dropped in settings.dropped:
            if catches(name, dropped):
                raise SelectionError(
                    f"This trainer compares {compared}, so that the kept site {name!r} would also train {dropped!r}, "
                    f"which is dropped. Keep or drop both{others}."
                )


def _python_arguments(settings: _Settings, targets: Sequence[str] | str) -> str:
    lines = [
        f"r={settings.rank},",
        f"lora_alpha={_number(settings.alpha)},",
        f"lora_dropout={_number(settings.dropout)},",
    ]
    if settings.use_rslora:
        lines.append("use_rslora=True,")
    if isinstance(targets, str):
        lines.append(f"target_modules={_python_text(targets)},")
    else:
        lines += _python_list("target_modules", targets)
    if settings.parameters:
        lines += _python_list("target_parameters", settings.parameters)
    for name, pattern in (("rank_pattern", settings.rank_pattern), ("alpha_pattern", settings.alpha_pattern)):
        if pattern:
            entries = (f"    {_python_text(key)}: {_number(value)}," for key, value in pattern.items())
            lines += [f"{name}={{", *entries, "},"]
    return "".join(f"    {line}\n" for line in lines)


def _python_list(name: str, texts: Sequence[str]) -> list[str]:
    if not texts:
        return [f"{name}=[],"]  # of target_modules, None would be PEFT's own choice
    return [f"{name}=[", *(f"    {_python_text(text)}," for text in texts), "],"]


def _python_text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # a JSON string is a Python string, in double quotes


def _yaml_text(text: str) -> str:
    """A dotted name as it is, anything else in single quotes, where a backslash is a backslash."""
    if re.fullmatch(r"[A-Za-z_]\w*(\.\w+)+", text, re.ASCII):
        return text
    return "'" + text.replace("'", "''") + "'"


def _number(number: float) -> str:
    """A number that Python and every YAML reader take for the same number; whole ones without a point."""
    if number == int(number) and number != 0:
        return str(int(number))
    digits, exponent, power = repr(number).partition("e")
    # YAML 1.1 takes 1e-05 for a text.
    return f"{digits}.0{exponent}{power}" if exponent and "." not in digits else f"{digits}{exponent}{power}"


def _whole_alpha(alpha: float, trainer: str) -> str:
    if alpha != int(alpha):
        raise SettingsError(f"alpha={alpha}, but {trainer} takes whole numbers. Pass one, or choose style 'peft'.")
    return str(int(alpha))
