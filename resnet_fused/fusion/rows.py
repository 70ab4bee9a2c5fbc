"""What became of each convolution of a model: the rows of the report."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass
class Row:
    """One convolution of the original model.

    Attributes:
        conv: its path in the original model.
        shape: such as "64→128 3×3/2".
        op: the op that computes it now, or "" if it is as it was.
        module: path of the fused module in the fused model.
        note: why it is not fused, or not further.
    """

    conv: str
    shape: str
    op: str = ""
    module: str | None = None
    note: str = "forward doesn't call it"


class Rows:
    """The rows of a model, by the path of the convolution."""

    def __init__(self, model: nn.Module) -> None:
        self._rows = {
            path: Row(path, _shape(module)) for path, module in model.named_modules() if isinstance(module, nn.Conv2d)
        }

    def all(self) -> list[Row]:
        return list(self._rows.values())

    def mark(self, conv: str, op: str, module: str, note: str) -> None:
        """The convolution at path `conv`, or the one that was fused into the module at this path before, is fused now."""
        row = next((r for r in self._rows.values() if r.module == conv), None) or self._rows.get(conv)
        if row is None:
            # F.conv2d on a parameter: known by the path of the module whose forward calls it.
            row = self._rows[conv] = Row(conv, "")
        row.op, row.module, row.note = op, module, note

    def note(self, conv: str, reason: str) -> None:
        """Why the convolution at path `conv` is not fused."""
        row = self._rows.get(conv)
        if row is not None and not row.op:
            row.note = reason

    def explain(self, module: nn.Module, path: str, reason: str, direct: bool = False) -> None:
        """The same reason for every convolution in the module at `path`, or for its direct children only."""
        for name, child in module.named_modules():
            if isinstance(child, nn.Conv2d) and not (direct and "." in name):
                self.note(join(path, name), reason)


def join(path: str, name: str) -> str:
    """Path of `name` inside of the module at `path`; either may be empty."""
    return f"{path}.{name}" if path and name else path or name


def _shape(conv: nn.Conv2d) -> str:
    groups = f" g{conv.groups}" if conv.groups > 1 else ""
    return f"{conv.in_channels}→{conv.out_channels} {'×'.join(map(str, conv.kernel_size))}/{conv.stride[0]}{groups}"
