"""rf.fuse: one line that makes a model's inference faster; rf.report: what it did, and why not more."""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass
from typing import IO, Any, get_args

import torch
from torch import Tensor, nn

from resnet_fused import config, tuning
from resnet_fused.backends import Precision, check_available
from resnet_fused.cuda_graph import CudaGraphed
from resnet_fused.fusion.copying import copy_of, copy_shared_tensors, tensors_of
from resnet_fused.fusion.replacing import Fuser
from resnet_fused.fusion.rows import Row
from resnet_fused.modules.fused import FusedModule
from resnet_fused.modules.linear import FusedLinear
from resnet_fused.modules.pool import FusedGlobalAvgPool2d
from resnet_fused.modules.sequential import FusedSequential
from resnet_fused.modules.settled import TakingOver
from resnet_fused.text import table
from resnet_fused.tolerance import relative_error

_ROWS = "_resnet_fused_rows"


def fuse(
    model: nn.Module,
    *,
    example_inputs: Any = None,
    inplace: bool = False,
    backend: str = "auto",
    precision: Precision = "fast",
    tune: bool = False,
    cuda_graph: bool = False,
) -> nn.Module:
    """Returns the model for inference, with batch norms folded into convolutions and residual blocks fused.

    The results are the same within rounding. Everything that can't be proved safe to fuse is left exactly as it was;
    `rf.report` says what and why. The model must be in eval mode: batch norms in training mode are left alone. Training the
    result is not supported; gradients by the input are.

    Args:
        model: any module. Fused are Conv-BN, Conv-BN-ReLU, Conv-BN-add-ReLU, stems (with max-pool) and residual blocks of
            two or three convolutions, wherever a module's forward can be traced.
        example_inputs: a tensor or a tuple of the model's arguments. The fused model is run on it and compared with the
            original, and the original is returned, with an error in the log, should they disagree.
        inplace: change `model` itself, which saves the memory of a copy. Where the model's own forward adds a residual,
            the result is another object all the same.
        backend: name of the backend for all fused ops, or "auto".
        precision: "exact" keeps to direct arithmetic; "fast" allows algorithms that trade rounding for speed (Winograd).
        tune: measure the candidates of every problem of the model, see `rf.tune`. Needs `example_inputs`.
        cuda_graph: replay the fused model as one CUDA graph per input shape; where capture isn't possible (on a CPU, say) it
            runs as it is. The model is then inside of a `CudaGraphed` module, as its attribute `model`.

    Raises:
        TypeError: `model` is no nn.Module.
        ValueError: an argument has no such value.
        BackendError: the backend is not available on this machine.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model is {type(model).__name__}; it must be a torch.nn.Module. Pass the model itself, not its output."
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            "model is a TorchScript module, whose forward can't be changed. Fuse the eager model before scripting it."
        )
    if precision not in get_args(Precision):
        raise ValueError(f"precision is {precision!r}; it must be one of {', '.join(map(repr, get_args(Precision)))}.")
    check_available(backend, "backend")
    if tune and example_inputs is None:
        raise ValueError("tune=True needs example_inputs: pass a tensor, or a tuple of the model's arguments, to measure with.")
    # Not asked of the model, since a wrapper around one in eval mode, such as DataParallel, is in training mode itself.
    norms = [m for m in model.modules() if isinstance(m, (nn.BatchNorm2d, nn.SyncBatchNorm))]
    training = sum(norm.training for norm in norms)
    if training:
        config.logger().warning(
            f"rf.fuse: {training} of the model's {len(norms)} batch norms are in training mode, where they are not fused. "
            "Call model.eval() first."
        )
    original = model
    # Outside of inference mode, so that parameters, copied and folded, count their changes.
    with torch.inference_mode(False), torch.no_grad():
        if not inplace:
            model = copy_of(model, share_tensors=True)
        elif example_inputs is not None:
            original = copy_of(model, share_tensors=True)
        before = _tensor_bytes(model)
        fuser = Fuser(model, precision, backend)
        fused = fuser.fuse(model)
        if not inplace:
            copy_shared_tensors(fused, original)
        if any(isinstance(m, FusedModule) for m in fused.modules()):
            kinds: tuple[type[TakingOver], ...] = (FusedSequential, FusedGlobalAvgPool2d)
            if precision == "fast":
                kinds += (FusedLinear,)
            for kind in kinds:
                for module in filter(kind.replaces, fused.modules()):
                    kind.take_over(module, backend)
        for module in fused.modules():
            if isinstance(module, nn.parallel.DistributedDataParallel):
                module._assign_modules_buffers()  # else it would broadcast those of the batch norms that were folded
    setattr(fused, _ROWS, (fuser.rows.all(), before))
    if example_inputs is not None:
        arguments = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
        if not _agree(original, fused, arguments):
            return original
        if tune:
            tuning.tune(fused, arguments)
    if cuda_graph:
        fused = CudaGraphed(fused)
    return fused


def _agree(original: nn.Module, fused: nn.Module, arguments: tuple[Any, ...]) -> bool:
    """Whether both models give the same on the example, up to rounding: 20 eps^0.8 in relative norm. Logs an error if not."""
    with torch.no_grad():
        want, got = (torch.utils._pytree.tree_leaves(m(*copy.deepcopy(arguments))) for m in (original, fused))
    for a, b in zip(want, got, strict=True):
        if isinstance(a, Tensor) and a.is_floating_point():
            error = relative_error(b, a.double())
            if not error < 20 * torch.finfo(a.dtype).eps ** 0.8 and bool(a.isfinite().all()):
                config.logger().error(
                    f"rf.fuse: the fused model disagrees with the original on example_inputs (relative error {error:.1e}), "
                    "so the original is returned. Please report this model."
                )
                return False
    return True


def _tensor_bytes(model: nn.Module) -> int:
    return sum(t.nbytes for t in tensors_of(model))


@dataclass
class Report:
    """What rf.fuse did to a model.

    Attributes:
        rows: one for each convolution of the original model.
        backends: by path of a fused module, the backends that served it so far, such as "onednn" or "onednn, reference".
        stock_bytes: parameters and buffers of the original model.
        fused_bytes: parameters and buffers of the fused model.
        packed_bytes: what backends packed from the parameters beside them, so far.
    """

    rows: list[Row]
    backends: dict[str, str]
    stock_bytes: int
    fused_bytes: int
    packed_bytes: int

    def __str__(self) -> str:
        rows = [
            (row.conv or "(model)", row.shape, row.op or "as it was", self.backends.get(row.module or "", ""), row.note)
            for row in self.rows
        ]
        count = sum(bool(row.op) for row in self.rows)
        total = (self.fused_bytes + self.packed_bytes) / max(self.stock_bytes, 1)
        backends = "" if any(self.backends.values()) else " Backends are chosen at the first call."
        return (
            table(("convolution", "shape", "fused into", "backend", "note"), rows)
            + f"\n{count} of {len(self.rows)} convolutions fused.{backends}\n"
            + f"Weights: {self.stock_bytes / 2**20:.1f} MiB before, {self.fused_bytes / 2**20:.1f} MiB now, and "
            + f"{self.packed_bytes / 2**20:.1f} MiB packed for the kernels: {total:.2f}× in all."
        )


def report(model: nn.Module, file: IO[str] | None = None) -> Report:
    """Prints a row for each convolution of a fused model: into which op it was fused, by which backend, and why not.

    Args:
        model: a result of `rf.fuse`. Run it once before, and the report names the backends that were chosen.
        file: where to print; standard output by default.

    Returns:
        What was printed, as a `Report`.

    Raises:
        ValueError: `model` is no result of rf.fuse.
    """
    if isinstance(model, CudaGraphed):
        model = model.model
    rows, stock_bytes = getattr(model, _ROWS, (None, 0))
    if rows is None:
        raise ValueError(f"model is a {type(model).__name__} that rf.fuse didn't make; pass what rf.fuse returned.")
    modules = {path: m for path, m in model.named_modules() if isinstance(m, FusedModule)}
    backends = {path: ", ".join(m.backends_used()) for path, m in modules.items()}
    packed = sum(m.packed_bytes() for m in model.modules() if isinstance(m, (FusedModule, FusedLinear)))
    result = Report(rows, backends, stock_bytes, _tensor_bytes(model), packed)
    print(result, file=file or sys.stdout)
    return result
