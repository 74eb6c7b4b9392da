"""Rows: which of the numbers that a module puts out belong to which row of the batch."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from torch import Tensor

from lorazor.adapter.sites import Site
from lorazor.errors import RowsUnclearError


def sequence_lengths(inputs: Mapping[str, Tensor]) -> set[int]:
    """The numbers of tokens that the rows of a batch have, as far as its inputs (rows, tokens, ...) say."""
    return {tensor.shape[1] for tensor in inputs.values() if tensor.ndim > 1}


def split_rows(output: Tensor, n_rows: int, site: Site, lengths: Collection[int] | None = None) -> Tensor:
    """View what a module of a site puts out as (rows, positions, d).

    Accepted is only what can be nothing but one row of the batch after the other:

    * anything, where the batch has one row;
    * (rows, n, ..., d) with n other than the rows: else the first axis may be that of the tokens (XLNet, Longformer);
    * (rows * tokens, d), as OPT's MLP has it, and outside of the layers (rows, d), such as a pooler's. But not from a
      module that is one of several in its layer, `experts.0.fc1`: an expert gets some of the tokens, in its own order.

    Args:
        output: what the module put out.
        n_rows: rows of the batch.
        site: where the module is.
        lengths: tokens that a row may have in (rows * tokens, d); any number if left out.
    Raises:
        RowsUnclearError: it may be something else.
    """
    if n_rows == 1:
        return output.reshape(1, -1, output.shape[-1])
    if output.ndim > 2:
        is_clear = output.shape[0] == n_rows != output.shape[1]
    else:
        n_positions, n_over = divmod(output.shape[0], n_rows)
        is_known = lengths is None or n_positions in lengths or (site.stack is None and n_positions == 1)
        is_clear = n_over == 0 and is_known and not _is_one_of_several(site.name)
    if not is_clear:
        raise RowsUnclearError(
            f"{site.name} puts out {tuple(output.shape)} for a batch of {n_rows} rows, which does not say what belongs "
            f"to which row. Give gates to rows in smaller batches, at last of one row."
        )
    return output.reshape(n_rows, -1, output.shape[-1])


def _is_one_of_several(name: str) -> bool:
    """Whether something numbered stands between the layer and the module: `layers.3.experts.0.fc1`, `expert_0.fc1`."""
    match = re.fullmatch(r".+?\.\d+\.(?P<between>.+)\.[^.]+", name)
    return match is not None and re.search(r"\d", match["between"]) is not None
