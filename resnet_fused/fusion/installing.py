"""Puts fast paths into a model, compares the result with stock on an example, and takes them out again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused import config
from resnet_fused.backends import Precision, check_available
from resnet_fused.backends.accuracy import difference
from resnet_fused.backends.problem import PRECISIONS
from resnet_fused.fusion.copying import copy_of
from resnet_fused.fusion.path import FastPath, Fusion, paths_off
from resnet_fused.fusion.rows import path_of, rows_of
from resnet_fused.fusion.scripting import install_hook, remove_hook
from resnet_fused.fusion.tracing import is_layer
from resnet_fused.runtime.executor import Settings
from resnet_fused.runtime.folding import NORMS


def install(model: nn.Module, precision: Precision, backend: str, replay: bool = False) -> Fusion:
    """Puts fast paths for inference into a model. Where it is fused for training, it stays so."""
    root = path_of(model)
    return _put(model, Fusion(Settings(precision, backend, replay), training=root is not None and root.fusion.training))


def install_training(model: nn.Module) -> Fusion:
    """Puts fast paths for training into a model. Where it is fused for inference, it stays so."""
    root = path_of(model)
    fused = root is not None and root.root and root.fusion.inference
    return _put(model, Fusion(root.fusion.settings if root is not None and fused else Settings(), fused, training=True))


def _put(model: nn.Module, fusion: Fusion) -> Fusion:
    """Puts fast paths into a model, at the forward of each module with a convolution in it."""
    unfuse(model)
    for module in model.modules():
        if module is model or _may_have_path(module):
            FastPath(module, fusion, module is model).install()
            install_hook(module)
    if fusion.inference:
        with torch.no_grad():
            fusion.rows = rows_of(model)
    return fusion


def _may_have_path(module: nn.Module) -> bool:
    if is_layer(module) or isinstance(module, torch.jit.ScriptModule) or ("forward" in vars(module) and _is_bound(module)):
        return False
    if type(module).forward is nn.Module.forward:
        return False  # of a ModuleList, say
    # A filter of one, two or three dimensions.
    return any(p is not None and 3 <= p.dim() <= 5 for m in module.modules() for p in m._parameters.values())


def _is_bound(module: nn.Module) -> bool:
    """Whether a module's own forward is a function that knows the module otherwise than as its first argument."""
    forward = vars(module)["forward"]
    return getattr(forward, "__self__", None) is not module and not isinstance(forward, FastPath)


def unfuse(model: nn.Module) -> nn.Module:
    """Takes the fast paths out of a model that rf.fuse made; it is as it was before, and returned.

    Args:
        model: a result of `rf.fuse`, or any module, which stays as it is.
    """
    for module in model.modules():
        path = path_of(module)
        if path is not None:
            path.remove()
        remove_hook(module)
    return model


def install_checked(
    model: nn.Module,
    *,
    inplace: bool = False,
    backend: str = "auto",
    precision: str = "fast",
    example_inputs: Any = None,
    replay: bool = False,
) -> tuple[nn.Module, bool]:
    """The fused model, and True; or the model as it was, and False, where it gives wrong results on `example_inputs`.

    Arguments as `rf.fuse`; `replay`: whether runs may become CUDA graphs.
    """
    _check(model, precision, backend)
    _warn_of_training(model)
    original = model
    # Outside of inference mode, so that copied parameters count their changes.
    with torch.inference_mode(False), torch.no_grad():
        if not inplace:
            model = _copied(model)
        install(model, PRECISIONS[precision], backend, replay)
    if example_inputs is not None:
        arguments = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
        fault = _fault(model, arguments)
        if fault is not None:
            config.logger().error(
                "rf.fuse: the fused model is wrong on example_inputs, so the original is returned: %s. "
                "Please report this model.",
                fault,
            )
            return (unfuse(model) if inplace else original), False
    return model, True


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy_of(model)
    except Exception as error:
        raise TypeError(
            f"model can't be copied ({error}), since something in it can't; pass inplace=True, which changes the model "
            "itself, and rf.unfuse(model) to undo it."
        ) from error


def fuse_training(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Returns the model with fused batch norms for training: each with the residual sum and the ReLU after it in one op.

    The model stays what it is: its class, modules, parameters, hooks and state dict are the original's, and so are loss,
    gradients, running statistics and random numbers, within rounding. Batch norms (nn.BatchNorm2d, nn.SyncBatchNorm, and
    modules such as timm's BatchNormAct2d whose forward calls F.batch_norm) become the ops of `rf.BasicBlock` and
    `rf.Bottleneck`, forward and backward, and convolutions run by this library's kernels where they are the faster. That is so
    in training mode, and in eval mode where a derivative may be asked for, wherever a module's forward can be traced; all else
    runs as the model calls it. Optimizers, autocast, DistributedDataParallel, checkpointing and gradient accumulation work as
    ever; torch.compile, torch.func and forward-mode differentiation get the model's own forward.

    A model may be fused for inference too, by `rf.fuse`, before or after. `rf.report` says how many norms are fused and why
    not more; `rf.unfuse` takes everything out.

    Args:
        model: any module.
        inplace: put the fast paths into `model` itself, instead of a copy. A copy has parameters of its own: make its
            optimizer afterwards.

    Raises:
        TypeError: `model` is no nn.Module, or can't be copied.
        ValueError: a parameter of the model has no shape yet.
    """
    _check_model(model)
    with torch.inference_mode(False):
        if not inplace:
            model = _copied(model)
        install_training(model)
    return model


def release_packed(model: nn.Module, example_inputs: Any) -> None:
    """Gives back the weights that kernels for inputs such as the example packed."""
    path = path_of(model)
    assert path is not None
    with torch.no_grad():
        model(*(example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)))
    path.release()


def _check(model: nn.Module, precision: str, backend: str) -> None:
    _check_model(model)
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; it must be 'fast' or 'direct'.")
    check_available(backend, "backend")


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model is {type(model).__name__}; it must be a torch.nn.Module. Pass the model itself, not its output."
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            "model is a TorchScript module, whose forward can't be changed. Fuse the eager model before scripting it."
        )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(
                f"model has the parameter {name!r} of a lazy module, which has no shape yet. Call the model once, then fuse it."
            )


def _warn_of_training(model: nn.Module) -> None:
    # Not asked of the model, since a wrapper around one in eval mode, such as DataParallel, is in training mode itself.
    norms = [m for m in model.modules() if isinstance(m, (*NORMS, nn.SyncBatchNorm))]
    training = sum(norm.training for norm in norms)
    if training:
        config.logger().warning(
            f"rf.fuse: {training} of the model's {len(norms)} batch norms are in training mode, where they are not fused. "
            "Call model.eval() first."
        )


@torch.no_grad()
def _fault(model: nn.Module, arguments: tuple[Any, ...]) -> str | None:
    """What is wrong with a fused model's result on an example; None if it is as good as stock's."""
    tensors = [*model.parameters(), *model.buffers(), *torch.utils._pytree.tree_leaves(arguments)]
    gpus = sorted({t.device.index for t in tensors if isinstance(t, Tensor) and t.device.type == "cuda"})
    with torch.random.fork_rng(gpus):
        state, states = torch.get_rng_state(), [torch.cuda.get_rng_state(gpu) for gpu in gpus]

        def run(call: Callable[..., Any], given: tuple[Any, ...]) -> Any:
            torch.set_rng_state(state)
            for gpu, own in zip(gpus, states, strict=True):
                torch.cuda.set_rng_state(own, gpu)
            return call(*given)

        with paths_off():
            want = run(model, copy.deepcopy(arguments))
            truth = _truth(model, arguments, run)
        try:
            got = run(model, copy.deepcopy(arguments))
        except Exception as error:
            return f"it raises {type(error).__name__}: {error}"
    return difference(got, want, truth)


def _truth(model: nn.Module, arguments: tuple[Any, ...], run: Callable[..., Any]) -> Any:
    """The model's result in float64; None where it can't be computed so."""

    def wide(x: Any) -> Any:
        return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

    tensors = {name: wide(t.detach()) for name, t in _named_tensors(model)}
    given = torch.utils._pytree.tree_map(wide, copy.deepcopy(arguments))
    try:
        return run(lambda *args: torch.func.functional_call(model, tensors, args), given)
    except Exception:  # tensors that are no parameters, operators without float64
        return None


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()
