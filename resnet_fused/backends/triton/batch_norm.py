"""The passes of batch norm that the Triton backend serves, on the kernels of bn.py."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from resnet_fused.backends.triton import batch_norm_kernels as bn
from resnet_fused.backends.triton.launch import Launch, aligned, on

_Result = TypeVar("_Result")


@functools.lru_cache(maxsize=1024)
def _bound(make: Any, device: torch.device, *args: Any) -> Any:
    """The launches that `make` gives, compiled for the device."""
    made = make(*args)
    if isinstance(made, Launch):
        return made.bind()
    first, second = made
    return first.bind(), second.bind()


def _on_its_device(run: Callable[..., _Result]) -> Callable[..., _Result]:
    """A pass with its first tensor's device as the current one, because kernels are compiled for that and launched there."""

    @functools.wraps(run)
    def guarded(self: TritonPasses, first: Tensor, *args: Any, **kwargs: Any) -> _Result:
        if first.device.type == "cuda" and torch.cuda.current_device() != first.device.index:
            with on(first.device):
                return run(self, first, *args, **kwargs)
        return run(self, first, *args, **kwargs)

    return guarded


class TritonPasses:
    """The passes of backends.batch_norm.BatchNormPasses in Triton."""

    @_on_its_device
    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        p = _plan_of(x)
        reduce, combine = _bound(bn.statistics, x.device, p, x.dtype)
        partial = x.new_empty(p.programs, 2, p.channels, dtype=torch.float32)
        mean, var = (x.new_empty(p.channels, dtype=torch.float32) for _ in range(2))
        reduce(aligned(x), partial)
        combine(partial, mean, var)
        return mean, var

    @_on_its_device
    def apply(
        self,
        x: Tensor,
        residual: Tensor | None,
        mean: Tensor,
        var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        relu: bool,
    ) -> Tensor:
        given = (residual is not None, weight is not None, bias is not None)
        run = _bound(bn.apply, x.device, _plan_of(x), x.dtype, *given, eps, relu)
        y = torch.empty_like(x)
        run(aligned(x), _aligned(residual), aligned(mean), aligned(var), _aligned(weight), _aligned(bias), y)
        return y

    @_on_its_device
    def backward_reduce(
        self, dy: Tensor, x: Tensor, y: Tensor | None, mean: Tensor, var: Tensor, eps: float, keep_masked: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        p = _plan_of(x)
        reduce, combine = _bound(bn.backward_reduce, x.device, p, x.dtype, y is not None, keep_masked, eps)
        masked = torch.empty_like(x) if keep_masked else None
        partial = x.new_empty(p.programs, 2, p.channels, dtype=torch.float32)
        dweight, dbias = torch.empty_like(mean), torch.empty_like(mean)
        reduce(aligned(dy), aligned(x), _aligned(y), aligned(mean), masked, partial)
        combine(partial, aligned(var), dweight, dbias)
        return dweight, dbias, masked

    @_on_its_device
    def backward_apply(
        self,
        dy: Tensor,
        x: Tensor | None,
        y: Tensor | None,
        mean: Tensor,
        var: Tensor,
        weight: Tensor | None,
        sums: tuple[Tensor, Tensor, float] | None,
        eps: float,
        keep_masked: bool,
    ) -> tuple[Tensor, Tensor | None]:
        dweight, dbias, count = sums if sums is not None else (None, None, 1)
        given = (sums is not None, y is not None, weight is not None, keep_masked)
        run = _bound(bn.backward_apply, dy.device, _plan_of(dy), dy.dtype, *given, eps, int(count))
        masked = torch.empty_like(dy) if keep_masked else None
        dx = torch.empty_like(dy)
        x = x if sums is not None else None
        per_channel = (aligned(mean), aligned(var), _aligned(weight), _aligned(dweight), _aligned(dbias))
        run(aligned(dy), _aligned(x), _aligned(y), *per_channel, masked, dx)
        return dx, masked


def _plan_of(x: Tensor) -> bn.Plan:
    n, c, h, w = x.shape
    return bn.plan(n, c, h, w, x.dtype, x.is_contiguous(memory_format=torch.channels_last))


def _aligned(x: Tensor | None) -> Tensor | None:
    return None if x is None else aligned(x)
