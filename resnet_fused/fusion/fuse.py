"""rf.fuse: one line that makes a model's inference faster, and leaves the model what it is."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from resnet_fused import tuning
from resnet_fused.fusion.cuda_graph import CudaGraphed
from resnet_fused.fusion.installing import install_checked, release_packed


def fuse(
    model: nn.Module,
    *,
    example_inputs: Any = None,
    inplace: bool = False,
    backend: str = "auto",
    precision: Literal["fast", "direct", "exact"] = "fast",
    tune: bool = False,
    cuda_graph: bool | Literal["auto"] = "auto",
    release: bool = False,
) -> nn.Module:
    """Returns the model with fast paths for inference: batch norms folded into convolutions, residual blocks fused.

    The model stays what it is: its class, modules, parameters, hooks and state dict are the original's. Where everything is as
    it was when a module's forward was traced, in eval mode and without a derivative of parameters, fused kernels compute it;
    every other call runs the module's own forward. Results are the same within rounding. `rf.report` says what is fused and why
    not more; `rf.unfuse` takes the fast paths out.

    Args:
        model: any module, in eval mode for inference. Fused are convolutions of images, signals and videos with what follows
            them (batch norm, sum, activation, max-pool), and residual blocks of two or three convolutions, wherever a module's
            forward can be traced.
        example_inputs: a tensor or a tuple of the model's arguments. The fused model is run on it and compared with the
            original, and the original is returned, with an error in the log, should they disagree.
        inplace: put the fast paths into `model` itself, instead of a copy.
        backend: name of the backend for all fused ops, or "auto".
        precision: "direct" keeps to direct sums; "fast" allows algorithms that trade rounding for speed (Winograd). "exact" is
            the old name of "direct".
        tune: measure the candidates of every problem of the model, see `rf.tune`. Needs `example_inputs`.
        cuda_graph: "auto": on a GPU, after a few calls with one kind of input, the fused part is replayed as a CUDA graph where
            launching its kernels takes longer than they do (small batches). True: the model as a whole is replayed, from the
            second call with a kind of input on; it is then inside of a `CudaGraphed` module, as its attribute `model`. False:
            never.
        release: give back the memory of the convolutions' weights, of which the kernels have packed copies, so that the model
            takes about as much memory as before. It then serves inputs such as `example_inputs`, which this needs, and nothing
            else: every access to such a weight raises an error that says so.

    Raises:
        TypeError: `model` is no nn.Module, or can't be copied.
        ValueError: an argument has no such value, or a parameter of the model has no shape yet.
        BackendError: the backend is not available on this machine.
    """
    if tune and example_inputs is None:
        raise ValueError("tune=True needs example_inputs: pass a tensor, or a tuple of the model's arguments, to measure with.")
    if release and example_inputs is None:
        raise ValueError("release=True needs example_inputs: a tensor, or a tuple of the model's arguments, to pack for.")
    if cuda_graph not in (True, False, "auto"):
        raise ValueError(f"cuda_graph is {cuda_graph!r}; it must be True, False or 'auto'.")
    arguments = {"inplace": inplace, "backend": backend, "precision": precision, "example_inputs": example_inputs}
    fused, right = install_checked(model, **arguments, replay=cuda_graph == "auto")
    if not right:
        return fused
    if tune:
        tuning.tune(fused, example_inputs)
    if release:
        release_packed(fused, example_inputs)
    return CudaGraphed(fused) if cuda_graph is True else fused
