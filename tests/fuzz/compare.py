"""The differences between what was seen of stock and of the fused model, with float64 as the judge of numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fuzz.snapshots import Event, TensorLeaf

TIMES_STOCK = 4.0
# Relative error that is always allowed, by dtype.
FLOOR = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
# Under autocast results may be float32 that were computed from bfloat16.
FLOOR_AUTOCAST = 2e-2
# Below this share of a value of 1, an error is of rounding, whatever cancelled.
SMALLEST_SCALE = 1e-2


@dataclass(frozen=True)
class Difference:
    """One difference: its kind ("value", "stride", "alias", …), the step, what differs, and how."""

    kind: str
    step: int
    where: str
    detail: str

    def __str__(self) -> str:
        return f"step {self.step}: {self.kind}: {self.where}: {self.detail}"


Truth = Callable[[], Sequence[Event]]
Key = tuple[int, str, int]


def compare(
    stock: Sequence[Event], ours: Sequence[Event], truth: Truth, ignored: frozenset[str] = frozenset()
) -> list[Difference]:
    """The differences of the first step that has any, later ones often being its consequences."""
    found: list[Difference] = []

    def add(kind: str, event: Event, where: str, detail: str) -> None:
        if event.label.startswith("state"):
            kind = "state value" if kind == "value" else "state"
        if kind not in ignored:
            found.append(Difference(kind, event.step, f"{event.label}: {where}", detail))

    judge: dict[Key, Event] = {}

    def true_value(key: Key, name: str) -> Tensor | None:
        if not judge:
            judge.update(_keyed(truth()))
        leaf = judge[key].leaves.get(name) if key in judge else None
        return leaf.value if isinstance(leaf, TensorLeaf) and leaf.value.is_floating_point() else None

    ours_keyed = _keyed(ours)
    for key, a in _keyed(stock).items():
        if found and found[0].step != a.step:
            break
        if key not in ours_keyed:
            add("flow", a, "events", f"stock: {_labels(stock, a.step)}; ours: {_labels(ours, a.step)}")
            continue
        b = ours_keyed[key]
        for name in (name for name in a.leaves if name not in b.leaves):
            add("structure", a, name, f"only in stock: {_text(a.leaves[name])}")
        for name in (name for name in b.leaves if name not in a.leaves):
            add("structure", a, name, f"only in ours: {_text(b.leaves[name])}")
        for name in (name for name in a.leaves if name in b.leaves):
            x, y = a.leaves[name], b.leaves[name]
            if isinstance(x, TensorLeaf) and isinstance(y, TensorLeaf):
                for sort, detail in _tensors(x, y, lambda key=key, name=name: true_value(key, name), a):
                    add(sort, a, name, detail)
            elif isinstance(x, TensorLeaf) != isinstance(y, TensorLeaf) or not _same(x, y):
                add(a.label.partition(" (")[0], a, name, f"stock: {_text(x)}; ours: {_text(y)}")
    if "flow" not in ignored:
        for key, b in ours_keyed.items():
            if key not in _keyed(stock) and (not found or found[0].step >= b.step):
                detail = f"stock: {_labels(stock, b.step)}; ours: {_labels(ours, b.step)}"
                found = [d for d in found if d.step == b.step] + [Difference("flow", b.step, b.label, detail)]
                break
    return found


def differs_in_rounding(a: Event, b: Event) -> bool:
    """Whether any value of two events differs in any bit."""
    pairs = [(x, b.leaves.get(name)) for name, x in a.leaves.items() if isinstance(x, TensorLeaf)]
    return any(
        isinstance(y, TensorLeaf) and x.shape == y.shape and not torch.equal(x.value.nan_to_num(), y.value.nan_to_num())
        for x, y in pairs
    )


def _keyed(events: Sequence[Event]) -> dict[Key, Event]:
    """Events by step, label, and how many of that label the step had before."""
    keyed: dict[Key, Event] = {}
    for event in events:
        n = 0
        while (event.step, event.label, n) in keyed:
            n += 1
        keyed[event.step, event.label, n] = event
    return keyed


def _labels(events: Sequence[Event], step: int) -> list[str]:
    """What happened at a step, leaving out what happens at every one."""
    found = [(e.label, e.leaves) for e in events if e.step == step]
    return [
        f"{label} {leaves['type']}" if label.startswith("exception") else label
        for label, leaves in found
        if not label.startswith(("state", "globals", "modes"))
    ]


def _same(x: Any, y: Any) -> bool:
    return type(x) is type(y) and (x == y or (x != x and y != y))


def _tensors(a: TensorLeaf, b: TensorLeaf, truth: Callable[[], Tensor | None], event: Event) -> list[tuple[str, str]]:
    found = []
    for kind in ("kind", "dtype", "shape", "stride", "requires_grad", "leaf", "inference", "alias", "same"):
        x, y = getattr(a, kind), getattr(b, kind)
        if x != y:
            found.append((kind, f"stock: {x!s}; ours: {y!s}"))
    if a.shape == b.shape and a.dtype == b.dtype:
        found += _values(a.value, b.value, truth, event)
    return found


def _values(a: Tensor, b: Tensor, truth: Callable[[], Tensor | None], event: Event) -> list[tuple[str, str]]:
    """Differences of values. Numbers may differ by rounding."""
    if torch.equal(a, b):
        return []
    if not a.is_floating_point():
        return [("value", f"{int((a != b).sum())} of {a.numel()} elements differ")]
    for name, mask in (("NaN", torch.isnan), ("Inf", torch.isposinf), ("-Inf", torch.isneginf)):
        x, y = mask(a), mask(b)
        if not torch.equal(x, y):
            return [("nan", f"{name} in {int(x.sum())} elements of stock, {int(y.sum())} of ours, both {int((x & y).sum())}")]
    finite = a.isfinite()
    if torch.equal(a[finite], b[finite]):
        return []
    x, y = a[finite].double(), b[finite].double()
    floor = max(FLOOR[a.dtype], FLOOR_AUTOCAST if "autocast" in event.label else 0.0)
    smallest = SMALLEST_SCALE
    if event.label.startswith("grads"):
        # A gradient may be the small difference of large ones, such as that of a bias before a batch norm in training.
        smallest = max(smallest, *(_rms(leaf.value) for leaf in event.leaves.values() if isinstance(leaf, TensorLeaf)))
    scale = max(float(x.norm()), smallest * x.numel() ** 0.5)
    apart = float((x - y).norm()) / scale
    if apart <= 0.7 * floor:  # then ours is within the tolerance wherever the truth is
        return []
    true = truth()
    if true is None or true.shape != a.shape:
        return [("value", f"relative difference {apart:.1e}, no float64 run to judge by")] if apart > 2 * floor else []
    t = true.double()[finite]
    if not bool(t.isfinite().all()):
        t = torch.where(t.isfinite(), t, x)
    scale = max(float(t.norm()), smallest * t.numel() ** 0.5)
    stock_error, error = float((x - t).norm()) / scale, float((y - t).norm()) / scale
    if error <= max(TIMES_STOCK * stock_error, floor):
        return []
    return [("value", f"relative error {error:.1e}, stock's {stock_error:.1e}, apart {apart:.1e}")]


def _rms(x: Tensor) -> float:
    finite = x[x.isfinite()].double()
    return float(finite.norm()) / max(finite.numel(), 1) ** 0.5


def _text(x: Any) -> str:
    return f"Tensor{x.shape} {x.dtype}" if isinstance(x, TensorLeaf) else str(x)[:300]
