"""rf.freeze: a fused model for processes without Python.

Its weights are constants, folded and packed, and every kernel is an operator that a compiled library registers from C++
(csrc/cpu/frozen.cpp; on a GPU csrc/cuda's own).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused.backends import BackendError, choice, freezer, get
from resnet_fused.backends.freezing import freeze_kernels
from resnet_fused.fusion.copying import copy_of
from resnet_fused.fusion.path import paths_off
from resnet_fused.fusion.rows import path_of
from resnet_fused.fusion.traces import Traced, Traces
from resnet_fused.runtime.executor import Settings, settle
from resnet_fused.runtime.kept import Unservable
from resnet_fused.runtime.parameters import Parameters
from resnet_fused.runtime.run import Run


class Frozen(nn.Module):
    """What `rf.freeze` returns."""

    def __init__(self, run: Run, examples: tuple[Tensor, ...]) -> None:
        super().__init__()
        self._run, self._examples, self._backend = run, examples, freezer(examples[0].device)

    def forward(self, *inputs: Tensor) -> Any:
        if len(inputs) != len(self._examples):
            raise ValueError(f"{len(inputs)} inputs were given; the model was frozen for {len(self._examples)}.")
        with torch.no_grad(), freeze_kernels(), paths_off():
            return self._run([self._backend.frozen_input(x, own) for x, own in zip(inputs, self._examples, strict=True)])


def freeze(model: nn.Module, example_inputs: Tensor | tuple[Tensor, ...]) -> nn.Module:
    """A fused model for deployment without Python: its folded and packed weights are constants, its kernels C++ operators.

    `torch.export.export(rf.freeze(fused, x), (x,))` and `torch._inductor.aoti_compile_and_package` make a package of it that a
    C++ program loads together with resnet_fused/lib/resnet_fused_cpu.so, or on a GPU resnet_fused_cuda.so. What no kernel of
    ours serves is a stock operator on folded weights. docs/elsewhere.md has the steps, examples/cpp the program.

    The result computes what `model` does at this moment; later changes of the model don't reach it. On a CPU it keeps folded
    weights beside those that Winograd's kernels take, for values whose arithmetic isn't as good as stock's there;
    precision="direct" of `rf.fuse` does without. A packing is for the instruction set of the CPU at hand: on one with another
    set the operators raise an error. On a GPU kernels are chosen among those of csrc/cuda and stock's, by a trial as at a first
    call, and whether float32 is computed in TF32 is as it is at this moment.

    Args:
        model: a result of `rf.fuse`, in eval mode, on the CPU or on a CUDA device.
        example_inputs: a tensor or a tuple of the model's arguments, all of them on the model's device, not empty. The result
            serves inputs of these shapes and dtypes, with any strides, and raises an error for others.

    Returns:
        a module without parameters or submodules. It runs in Python, too.

    Raises:
        TypeError: an argument is of another type, or the model can't be copied.
        ValueError: the model isn't a fused one, is in training mode, or no program of kernels computes it as a whole; an
            example is empty, or they are on several devices; or autocast is on.
        BackendError: the compiled kernels aren't available here, or the model is fused for a backend without a frozen form.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; it must be a torch.nn.Module that rf.fuse returned.")
    path = path_of(model)
    if path is None:
        raise ValueError("model is not fused; freeze what rf.fuse(model) returns.")
    examples = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    if not examples:
        raise ValueError("example_inputs is empty; give the model's arguments.")
    for x in examples:
        if not isinstance(x, Tensor):
            raise TypeError(f"example_inputs has a {type(x).__name__}; it must be a tensor or a tuple of tensors.")
        if x.device != examples[0].device or x.layout is not torch.strided or x.numel() == 0:
            raise ValueError(
                f"example_inputs has a tensor of shape {tuple(x.shape)} on {x.device}; frozen models take strided tensors of "
                "one device that aren't empty. For others package the fused model itself, as docs/elsewhere.md shows."
            )
    backend = freezer(examples[0].device)
    if model.training:
        raise ValueError("model is in training mode, and a frozen model is for inference; call model.eval() first.")
    if torch.is_autocast_enabled(examples[0].device.type):
        raise ValueError(
            "autocast is on, which a frozen model can't follow; freeze outside of it, or convert the model with .to()."
        )
    settings = replace(path.fusion.settings, replay=False)
    chosen = choice(settings.backend)
    if chosen != "auto" and not get(chosen).freezes:
        raise BackendError(f"backend {chosen!r} has no frozen form; fuse the model with backend='auto' or {backend.name!r}.")
    reason = backend.unavailable()
    if reason is not None:
        raise BackendError(f"a model can't be frozen here: {reason}.")
    with torch.inference_mode(False), torch.no_grad(), freeze_kernels(), paths_off():
        # Of copies, since the caller may write to these.
        examples = tuple(x.detach().clone() for x in examples)
        try:
            model = copy_of(model)
        except Exception as error:
            raise TypeError(
                f"model can't be copied ({error}), since something in it can't, so it can't be frozen. Package the fused model "
                "itself, as docs/elsewhere.md shows."
            ) from error
        traced = _traced(model, settings, examples)
        inputs = [backend.frozen_input(x, x) for x in examples]
        try:
            run, _ = settle(traced.built.program, inputs, traced.tensors, Parameters(), settings, model)
        except Unservable as error:
            raise ValueError(f"model can't be frozen for such inputs: {error}.") from error
    return Frozen(run, examples).eval()


def _traced(model: nn.Module, settings: Settings, examples: tuple[Tensor, ...]) -> Traced:
    """A program of the model for the examples."""
    traces = Traces(model, settings)
    traced = traces.of_any_size()
    if traces.by_size:
        traced = traces.make_for_size(examples) or traced
    if traced is None:
        raise ValueError(f"model can't be frozen, since its forward isn't one program: {traces.untraceable}. See rf.report.")
    taken = traced.built.program.inputs
    if taken != len(examples):
        raise ValueError(f"example_inputs has {len(examples)} tensors; the model's forward takes {taken}. Give all of them.")
    return traced
