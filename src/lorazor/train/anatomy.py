"""Which parts a training step has, and what they hang on: read off one forward pass with LoRA on all sites."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Literal, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lorazor.adapter.sites import LiveSite, find_sites, site_parameters
from lorazor.select.cost import Costs, Part

Unit = Literal["seconds", "bytes"]


@dataclasses.dataclass(frozen=True)
class Anatomy:
    """What a forward pass with LoRA on all sites shows of them.

    Attributes:
        times: when each runs: even, and the same for sites of one input.
        widths: numbers that go into and come out of each.
        maps: of each frozen map outside A and B, (time, multiplications of a pass through it); odd times are between
            sites.
        saved: of each tensor that autograd keeps, (bytes, the sites that save it, the last time at which something
            frozen does); weights left out, each storage once.
        weights: bytes of A and B of each site.
    """

    times: tuple[int, ...]
    widths: tuple[float, ...]
    maps: tuple[tuple[int, float], ...]
    saved: tuple[tuple[int, tuple[int, ...], int | None], ...]
    weights: tuple[int, ...]

    @classmethod
    def of(cls, model: PeftModel, run: Callable[[], Any]) -> Anatomy:
        """Look at a forward pass.

        Args:
            model: that runs.
            run: the pass; what it returns is forgotten.
        """
        sites, seen = find_sites(model), _Seen()
        held = {one.untyped_storage().data_ptr() for one in (*model.parameters(), *model.buffers())}
        with ExitStack() as stack:
            for index, site in enumerate(sites):
                module = cast(nn.Module, site.module)
                enter = lambda module, args, kwargs, index=index: seen.enter(index, [*args, *kwargs.values()])  # noqa: E731
                stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(seen.leave).remove)
            of_sites = {id(one) for site in sites for one in site_parameters(site.module, site.adapter)}
            for module in model.modules():
                own = [one for one in module.parameters(recurse=False) if one.ndim > 1 and id(one) not in of_sites]
                if own and not isinstance(module, nn.Embedding):
                    n_weights = sum(one.numel() for one in own)
                    look = lambda module, inputs, out, n=n_weights: seen.pass_map(n, inputs)  # noqa: E731
                    stack.callback(module.register_forward_hook(look).remove)
            with saved_tensors_hooks(lambda tensor: seen.save(tensor, held), lambda tensor: tensor):
                result = run()
        del result
        return cls(
            tuple(itertools.accumulate(range(len(sites)), seen.time_of, initial=2))[1:],
            tuple(seen.widths.get(index, 0.0) for index in range(len(sites))),
            tuple(seen.maps),
            tuple((storage.nbytes(), tuple(sorted(by)), time) for storage, by, time in seen.saved.values()),
            tuple(map(n_bytes_of_site, sites)),
        )

    def features(self, unit: Unit) -> list[Costs]:
        """What the cost is a sum of, each times an unknown number, for `fit_costs`."""
        empty, places = Costs(1.0, self.times, ()), range(len(self.times))

        def feature(parts: Sequence[Part]) -> Costs:
            return Costs(0.0, self.times, tuple(parts))

        weights = feature([Part(self.weights[site], (site,)) for site in places])
        if unit == "bytes":
            frozen = _by_time((time, n) for n, by, time in self.saved if not by and time is not None)
            return [empty, feature(frozen), feature([Part(n, by, time) for n, by, time in self.saved if by]), weights]
        widths = feature([Part(self.widths[site], (site,)) for site in places])
        return [empty, feature(_by_time(self.maps)), widths, feature([Part(1.0, (site,)) for site in places])]


class _Seen:
    """What hooks have seen of a forward pass so far."""

    def __init__(self) -> None:
        self.times: dict[int, int] = {}
        self.widths: dict[int, float] = {}
        self.maps: list[tuple[int, float]] = []
        self.saved: dict[int, tuple[torch.UntypedStorage, set[int], int | None]] = {}
        self._clock, self._input, self._inside = 0, None, cast(list[int], [])

    def time_of(self, before: int, site: int) -> int:
        """When a site ran; of one that did not (an expert that no token was sent to), when the site before it did."""
        return self.times.get(site, before)

    def enter(self, site: int, inputs: Sequence[Any]) -> None:
        tensor = next(one for one in inputs if isinstance(one, Tensor))
        if self._input is not tensor:
            self._clock, self._input = self._clock + 2, tensor
        self.times.setdefault(site, self._clock)
        self.widths[site] = self.widths.get(site, 0.0) + tensor.numel()
        self._inside.append(site)

    def leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        site = self._inside.pop()
        self.widths[site] += output.numel() if isinstance(output, Tensor) else 0

    def pass_map(self, n_weights: int, inputs: Sequence[Any]) -> None:
        tensor = next((one for one in inputs if isinstance(one, Tensor)), None)
        if tensor is not None and tensor.ndim > 1:
            self.maps.append((self._now, float(n_weights) * tensor.numel() / tensor.shape[-1]))

    def save(self, tensor: Tensor, held: set[int]) -> Tensor:
        storage = tensor.untyped_storage()  # kept, so that no address is used twice
        if (address := storage.data_ptr()) not in held:
            _, by, time = self.saved.get(address, (storage, set(), None))
            if self._inside:
                by.add(self._inside[-1])
            else:
                time = self._now  # of several, the last
            self.saved[address] = (storage, by, time)
        return tensor

    @property
    def _now(self) -> int:
        return self._clock if self._inside else self._clock + 1


def _by_time(amounts: Any) -> list[Part]:
    """One part for each time, in order."""
    sums: dict[int, float] = {}
    for time_, amount in amounts:
        sums[time_] = sums.get(time_, 0.0) + amount
    return [Part(amount, (), time_) for time_, amount in sorted(sums.items())]


def n_bytes_of_site(site: LiveSite) -> int:
    """Bytes of A and B."""
    return sum(one.nbytes for one in site_parameters(site.module, site.adapter))
