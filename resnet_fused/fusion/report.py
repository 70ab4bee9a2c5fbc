"""rf.report: what rf.fuse did to a model, convolution by convolution, and why not more."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import IO

from torch import nn

from resnet_fused.fusion.copying import tensors_of
from resnet_fused.fusion.cuda_graph import CudaGraphed
from resnet_fused.fusion.path import FastPath
from resnet_fused.fusion.rows import NormRow, Row, norm_rows_of, path_of, rows_of
from resnet_fused.text import table


@dataclass
class Report:
    """What rf.fuse did to a model.

    Attributes:
        rows: one for each convolution of the model, where it is fused for inference.
        stock_bytes: what the model's parameters and buffers take in stock.
        parameter_bytes: what they take now: less after `rf.fuse(release=True)`.
        packed_bytes: what backends packed from the parameters beside them, so far.
        calls_fused, calls_stock: calls of the model in which a fast path served, and in which none did.
        reason: why the last of the latter ran as stock.
        graphs: kinds of input for which fused kernels are replayed as a CUDA graph.
        norms: one row for each batch norm, where the model is fused for training.
        inference, training: whether it is fused for inference, and for training.
    """

    rows: list[Row]
    stock_bytes: int
    parameter_bytes: int
    packed_bytes: int
    calls_fused: int
    calls_stock: int
    reason: str
    graphs: int = 0
    norms: list[NormRow] = field(default_factory=list)
    inference: bool = True
    training: bool = False

    @property
    def fused(self) -> int:
        """How many convolutions are fused."""
        return sum(bool(row.op) for row in self.rows)

    @property
    def left(self) -> Counter[str]:
        """Why the other convolutions are not fused, and how many of them each reason holds."""
        return Counter(row.note for row in self.rows if not row.op)

    @property
    def norms_fused(self) -> str:
        """What `rf.fuse_training` did, in a sentence and a line for each reason why a norm isn't fused."""
        ops = ", ".join(f"{op} {count}" for op, count in Counter(row.op for row in self.norms if row.op).most_common())
        reasons = Counter(row.note for row in self.norms if not row.op)
        left = "".join(f"\n  {count} not: {reason}" for reason, count in reasons.most_common())
        fused = sum(bool(row.op) for row in self.norms)
        return f"Training: {fused} of {len(self.norms)} batch norms fused" + (f" ({ops})." if ops else ".") + left

    @property
    def no_faster(self) -> str:
        """Why the model isn't faster than stock, in a sentence; "" where nothing says so."""
        if self.calls_fused or not self.inference:
            return ""
        if not self.rows:
            return "The model is no faster than stock: it has no convolution, so nothing was fused."
        if not self.fused:
            return (
                f"The model is no faster than stock: nothing was fused. Most frequent reason: {self.left.most_common(1)[0][0]}."
            )
        if self.calls_stock:
            return f"The model was no faster than stock so far: no call was fused. Last reason: {self.reason}."
        return ""

    def __str__(self) -> str:
        parts = [*([self._convolutions()] if self.inference else []), *([self.norms_fused] if self.training else [])]
        return "\n".join(parts)

    def _convolutions(self) -> str:
        """The table of convolutions, and what follows it."""
        rows = [(row.conv or "(model)", row.shape, row.op or "stock", row.backends, row.note) for row in self.rows]
        backends = "" if any(row.backends for row in self.rows) else " Backends are chosen at the first call."
        total = (self.parameter_bytes + self.packed_bytes) / max(self.stock_bytes, 1)
        calls = f"{self.calls_fused} calls fused, {self.calls_stock} as stock" + (f": {self.reason}" if self.reason else "")
        replayed = f" {self.graphs} kinds of input are replayed as CUDA graphs." if self.graphs else ""
        weights, packed = (f"{size / 2**20:.1f} MiB" for size in (self.parameter_bytes, self.packed_bytes))
        return (
            table(("convolution", "shape", "fused into", "backend", "note"), rows)
            + f"\n{self.fused} of {len(self.rows)} convolutions fused.{backends} {calls}.{replayed}\n"
            + f"Weights: {weights}, and {packed} packed for the kernels: {total:.2f}× stock's in all."
            + (f"\n{self.no_faster}" if self.no_faster else "")
        )


def report(model: nn.Module, file: IO[str] | None = None) -> Report:
    """Prints a row for each convolution of a fused model: into which op it was fused, by which backend, and why not.

    Of a model that is fused for training it also says how many batch norms are, in its present mode.

    Args:
        model: a result of `rf.fuse`, `rf.fuse_training` or both. Run it once before, and the report names the backends that
            were chosen.
        file: where to print; standard output by default.

    Returns:
        What was printed, as a `Report`.

    Raises:
        ValueError: `model` is no result of rf.fuse or rf.fuse_training.
    """
    path = fused_path(model)
    if path is None:
        raise ValueError(f"model is a {type(model).__name__} that rf.fuse didn't make; pass what rf.fuse returned.")
    fusion, fused = path.fusion, path.module
    stock_bytes = sum(t.numel() * t.element_size() for t in (*fused.parameters(), *fused.buffers()))
    parameter_bytes = sum(t.nbytes for t in tensors_of(fused))
    packed = fusion.parameters.packed_bytes()
    paths = (path_of(module) for module in fused.modules())
    replays = [run.replay for own in paths if own is not None for run in own.runs() if run.replay is not None]
    result = Report(
        *(
            rows_of(fused) if fusion.inference else [],
            stock_bytes,
            parameter_bytes,
            packed,
            fusion.calls_served,
            fusion.calls_stock,
            fusion.reason,
        ),
        graphs=sum(replay.graph is not None for replay in replays),
        norms=norm_rows_of(fused) if fusion.training else [],
        inference=fusion.inference,
        training=fusion.training,
    )
    print(result, file=file or sys.stdout)
    return result


def fused_path(model: nn.Module) -> FastPath | None:
    """The path of the model that rf.fuse was given, if it is `model`, or what a wrapper of the library's holds."""
    path = path_of(model.model if isinstance(model, CudaGraphed) else model)
    return path if path is not None and path.root else None
