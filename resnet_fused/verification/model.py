"""rf.verify: how far a fused model's results are from the truth, beside stock's, layer by layer."""

from __future__ import annotations

import contextlib
import copy
import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused.backends.accuracy import allowed, judge, misplaced
from resnet_fused.fusion.copying import copy_of
from resnet_fused.fusion.installing import unfuse
from resnet_fused.fusion.rows import join, path_of
from resnet_fused.text import table


@dataclass
class LayerError:
    """Relative errors of one layer's result against float64, ‖y − truth‖ / ‖truth‖.

    `stock` is the larger one of stock's two memory formats.
    `nan_mismatch` counts the fused model's elements that are NaN or Inf where they mustn't be, or aren't where they must.
    """

    layer: str
    stock: float
    fused: float
    nan_mismatch: int


@dataclass
class Verification:
    """Errors of every layer that both models have, in order of execution; the last row is the model's result."""

    layers: list[LayerError]
    dtype: torch.dtype

    @property
    def passed(self) -> bool:
        """Whether the model's result is as near to the truth as it must be: twice stock's error, or a small floor."""
        final = self.layers[-1]
        return final.nan_mismatch == 0 and final.fused <= allowed(final.stock, self.dtype)

    def __str__(self) -> str:
        rows = [(e.layer, f"{e.stock:.1e}", f"{e.fused:.1e}", str(e.nan_mismatch or "")) for e in self.layers]
        verdict = "passed" if self.passed else "FAILED"
        return f"{table(('layer', 'stock', 'fused', 'NaN mismatch'), rows)}\n{verdict}: errors against float64, {self.dtype}"


@torch.no_grad()
def verify(stock: nn.Module, fused: nn.Module, inputs: Any) -> Verification:
    """Compares a fused model with its original: errors of both against the original in float64, block by block.

    Args:
        stock: the original model, in eval mode.
        fused: what `rf.fuse` made of it.
        inputs: a tensor or a tuple of the model's arguments, on the models' device and of their dtype.

    Returns:
        The errors; `print` it for a table. `passed` tells whether the result keeps the library's promise.

    Raises:
        ValueError: the models' results differ in structure, or `stock` is in training mode.
    """
    # Not asked of the model, since a wrapper around one in eval mode, such as DataParallel, is in training mode itself.
    if any(m.training for m in stock.modules() if not list(m.children())):
        raise ValueError("stock is in training mode, where results depend on the batch; call stock.eval() first.")
    unfused = unfuse(copy_of(stock))
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)
    exact = tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in copy.deepcopy(arguments))
    watched = _blocks(fused)

    def results(model: nn.Module, given: tuple[Any, ...]) -> dict[str, Tensor]:
        return {**_results(model, given, watched), **_results(model, given, [])}

    by_stock, by_fused, other = results(stock, arguments), results(fused, arguments), {}
    with contextlib.suppress(RuntimeError):  # of a forward with `view`, which contiguous tensors alone take
        other = results(_in_other_format(stock), arguments)
    truth = results(unfused.double(), exact)
    rows = []
    dtype = torch.float32
    for name, want in truth.items():
        a, b = by_stock.get(name), by_fused.get(name)
        if a is None or b is None:
            continue
        if a.shape != want.shape or b.shape != want.shape:
            raise ValueError(
                f"fused gives shape {tuple(b.shape)} at {name!r} and stock {tuple(a.shape)}; "
                "pass a model and what rf.fuse made of it."
            )
        dtype = a.dtype
        verdict, also = judge(b, a, want), judge(b, other.get(name, a), want)
        rows.append(LayerError(name, max(verdict.stock, also.stock), verdict.error, sum(misplaced(b, a, want))))
    if not rows:
        raise ValueError("fused and stock give no results to compare; pass a model and what rf.fuse made of it.")
    return Verification(rows, dtype)


def _in_other_format(stock: nn.Module) -> nn.Module:
    """A copy of the model in the other of stock's two memory formats than `stock` is in."""
    weights = [p for p in stock.parameters() if p.dim() == 4 and p.shape[1] > 1 and p.shape[2:] != (1, 1)]
    channels_last = any(not p.is_contiguous() for p in weights)
    return unfuse(copy_of(stock)).to(memory_format=torch.contiguous_format if channels_last else torch.channels_last)


def _blocks(fused: nn.Module) -> list[str]:
    """Paths of the residual blocks that are computed as one op."""
    found = []
    for path, module in fused.named_modules():
        fast = path_of(module)
        built = None if fast is None else fast.traces.for_report()
        for group in built.groups.values() if built is not None else ():
            names = [match.name.split(".") for match in group.convolutions]
            if len(names) > 1:
                same = itertools.takewhile(lambda parts: len({*parts}) == 1, zip(*names, strict=False))
                found.append(join(path, ".".join(part for part, *_ in same)))
    return [path for path in dict.fromkeys(found) if path]


def _results(model: nn.Module, arguments: tuple[Any, ...], watched: list[str]) -> dict[str, Tensor]:
    """Results of the watched modules and of the model itself, by name."""
    found: dict[str, Tensor] = {}
    handles = []
    for path in watched:
        module = model.get_submodule(path)
        handles.append(module.register_forward_hook(lambda m, a, y, path=path: found.__setitem__(path, y.detach().clone())))
    try:
        output = model(*copy.deepcopy(arguments))
    finally:
        for handle in handles:
            handle.remove()
    for i, leaf in enumerate(torch.utils._pytree.tree_leaves(output)):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            found[f"result {i}" if i else "result"] = leaf
    return found
