"""What became of each convolution of a model: the rows of the report."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from resnet_fused.fusion.path import FastPath
from resnet_fused.runtime.folding import CONVOLUTIONS


@dataclass
class Row:
    """One convolution of the model.

    Attributes:
        conv: its path in the model.
        shape: such as "64→128 3×3/2".
        op: the op that computes it, or "" where stock does.
        path: path of the module whose forward has the program with that op; "" is the model itself.
        backends: those that served it so far, such as "cpu" or "cpu, reference".
        note: why it is not fused, or not further; or why the last call ran as stock.
    """

    conv: str
    shape: str
    op: str = ""
    path: str | None = None
    backends: str = ""
    note: str = "forward doesn't call it"


@dataclass
class NormRow:
    """One batch norm of a model that is fused for training.

    Attributes:
        norm: its path in the model.
        op: the op that computes it where a derivative may be asked for, or "" where stock does.
        note: why it is not fused.
    """

    norm: str
    op: str = ""
    note: str = "forward doesn't call it"


def path_of(module: nn.Module) -> FastPath | None:
    """The fast path that was installed at a module's forward."""
    own = vars(module)
    for name in ("forward", "_path"):
        found = own.get(name)
        if isinstance(found, FastPath) and found.module is module:
            return found
    return None


def rows_of(model: nn.Module) -> list[Row]:
    """A row for each convolution of a model, as it is now."""
    convs = {p: m for p, m in model.named_modules(remove_duplicate=False) if isinstance(m, CONVOLUTIONS)}
    rows = {p: Row(p, _shape(m)) for p, m in convs.items()}
    _explain(model, "", rows)
    served = _backends(model)
    for row in rows.values():
        row.backends = ", ".join(sorted(served.get(row.conv, ())))
    # A convolution that stands in several places is told of once by the program.
    told = {id(m): rows[p] for p, m in reversed(convs.items()) if rows[p].op}
    for path, conv in convs.items():
        if not rows[path].op and id(conv) in told:
            rows[path] = replace(told[id(conv)], conv=path)
    return [*rows.values()]


def _explain(module: nn.Module, path: str, rows: dict[str, Row]) -> None:
    fast = path_of(module)
    built = None if fast is None else fast.traces.for_report()
    if fast is None or built is None:
        for name, child in module.named_children():
            own = rows.get(join(path, name))
            if own is not None and not own.op and fast is not None:
                own.note = fast.traces.reasons.get(name, fast.traces.untraceable)
            _explain(child, join(path, name), rows)
        if fast is not None and path in rows:
            rows[path].note = fast.traces.untraceable
        return
    for group in built.groups.values():
        for match in group.convolutions:
            row = rows.setdefault(join(path, match.name), Row(join(path, match.name), ""))
            row.op, row.path, row.note = group.label, path, match.note
            if fast.reason and fast.reason != "not called yet":
                row.note = f"the last call ran as stock: {fast.reason}"
    for name, reason in built.reasons.items():
        row = rows.setdefault(join(path, name), Row(join(path, name), ""))
        if not row.op:
            row.note = reason
    for name, reason in built.trace.opaque.items():
        child = module.get_submodule(name)
        for inner, conv in child.named_modules():
            own = rows.get(join(join(path, name), inner)) if isinstance(conv, CONVOLUTIONS) else None
            if own is not None and not own.op and own.note == Row.note:
                own.note = reason
        _explain(child, join(path, name), rows)


def norm_rows_of(model: nn.Module) -> list[NormRow]:
    """A row for each batch norm of a model over images, as it is now."""
    norms = {p: m for p, m in model.named_modules() if isinstance(m, (nn.BatchNorm2d, nn.SyncBatchNorm))}
    rows = {p: NormRow(p) for p in norms}
    _explain_norms(model, "", "", rows)
    return [*rows.values()]


def _explain_norms(module: nn.Module, path: str, reason: str, rows: dict[str, NormRow]) -> None:
    """`reason`: why the module around this one isn't traced through it."""
    fast = path_of(module)
    trained = None if fast is None else fast.training[module.training].for_report()
    if fast is not None and trained is None:
        reason = fast.training[module.training].untraceable
    row = rows.get(path)
    if row is not None and not row.op and reason:
        row.note = reason
    if trained is None:
        for name, child in module.named_children():
            _explain_norms(child, join(path, name), reason, rows)
        return
    for match in trained.matches:
        if (row := rows.get(join(path, match.name))) is not None:
            row.op, row.note = match.op, ""
    for name, own in trained.trace.opaque.items():
        _explain_norms(module.get_submodule(name), join(path, name), own, rows)


def _backends(model: nn.Module) -> dict[str, set[str]]:
    """Backends that served each convolution, in programs of whichever module."""
    found: dict[str, set[str]] = {}
    for path, module in model.named_modules():
        fast = path_of(module)
        served = [(traced.built, run) for traced in (() if fast is None else fast.traces) for run in traced.runs.values()]
        for built, run in served:
            for number, (_, backend) in run.problems.items():
                group = built.groups.get(number)
                for match in group.convolutions if group is not None else ():
                    found.setdefault(join(path, match.name), set()).add(backend)
    return found


def join(path: str, name: str) -> str:
    """Path of `name` inside of the module at `path`; either may be empty."""
    return f"{path}.{name}" if path and name else path or name


def _shape(conv: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> str:
    groups = f" g{conv.groups}" if conv.groups > 1 else ""
    return f"{conv.in_channels}→{conv.out_channels} {'×'.join(map(str, conv.kernel_size))}/{conv.stride[0]}{groups}"
