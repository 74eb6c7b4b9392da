"""A summary of an adapter folder: sites per layer and kind, norms, dead sites. No base model is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lorazor.adapter.directions import squared_norm_of
from lorazor.adapter.folder import AdapterFolder, load_tensors, split_key
from lorazor.adapter.sites import Site


@dataclass(frozen=True)
class SiteNorm:
    """A site and the size of its update.

    Attributes:
        site: the site.
        norm: Frobenius norm of s B A, in units of the base weight.
    """

    site: Site
    norm: float

    @property
    def is_dead(self) -> bool:
        """Whether the site changes nothing: B A = 0."""
        return self.norm == 0


def site_norms(folder: AdapterFolder) -> list[SiteNorm]:
    """The size of every site's update, in the order of `folder.sites`.

    Each is s ||B A||_F, computed from two r x r matrices, never from the d_out x d_in product.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_tensors(folder).items():
        split = split_key(key)
        if split is not None:
            parts.setdefault(split[0], {})[split[1]] = tensor.double()
    return [SiteNorm(site, site.scaling * _product_norm(parts[site.name])) for site in folder.sites]


def _product_norm(tensors: dict[str, Tensor]) -> float:
    if "lora_embedding_A" in tensors:
        a, b = tensors["lora_embedding_A"], tensors["lora_embedding_B"]
    else:
        a, b = tensors["lora_A.weight"], tensors["lora_B.weight"]
    return float(squared_norm_of(a, b).sqrt())
