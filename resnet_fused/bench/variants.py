"""The ways to run a model that are compared: stock, torch.compile, this library, and other engines where installed."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import resnet_fused as rf
from resnet_fused import config
from resnet_fused.bench.workloads import Workload

# A result is a tensor, or a structure of them: a pyramid's levels, say.
Run = Callable[[], Any]

EAGER = "stock eager"
CHANNELS_LAST = "stock channels_last"
COMPILE = "torch.compile, frozen"
COMPILE_GRAPHS = "torch.compile, frozen, CUDA graphs"
OURS = "resnet_fused"
OURS_GRAPH = "resnet_fused, cuda_graph=True"
# Other engines by the names that the command's option takes.
PEERS = {"onnxruntime": "onnxruntime", "openvino": "openvino"}
GPU_PEERS = {"max-autotune": "torch.compile, max-autotune", "tensorrt": "Torch-TensorRT"}


class Unavailable(Exception):
    """A variant can't run here; the message says why, and where something is missing, what to install."""


def make(name: str, model: nn.Module, x: Tensor) -> Run:
    """A call that runs the model on x by the variant of that name, and returns its result.

    Raises:
        Unavailable: the variant can't run on this machine or this dtype.
    """
    return _MAKERS[name](copy.deepcopy(model), x)


def _eager(model: nn.Module, x: Tensor) -> Run:
    return lambda: model(x)


def _channels_last(model: nn.Module, x: Tensor) -> Run:
    model, x = in_channels_last(model, x)
    return lambda: model(x)


def in_channels_last(model: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
    """A model and its input with channels in the last place in memory. For signals there is no such format of weights."""
    if x.dim() == 3:
        return model, x.transpose(1, 2).contiguous().transpose(1, 2)
    format = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    return model.to(memory_format=format), x.contiguous(memory_format=format)


def _compile(model: nn.Module, x: Tensor, graphs: bool = False, tuned: bool = False) -> Run:
    # With the second mode="reduce-overhead" differs from the default, and with both of the latter "max-autotune".
    options: dict[str, Any] = {"freezing": True, "triton.cudagraphs": graphs, "max_autotune": tuned}
    model, x = in_channels_last(model, x)
    compiled = torch.compile(model, options=options)
    try:
        compiled(x)
    except Exception as error:  # a C++ compiler that isn't there, say: the other variants can be compared all the same
        reason = str(error).strip().splitlines() or [""]
        raise Unavailable(f"torch.compile failed: {type(error).__name__}: {reason[0][:80]}") from error
    return lambda: compiled(x)


def time_to_compile(workload: Workload, most: float) -> float | None:
    """Seconds until the first result of COMPILE, in a process of its own; None where it takes more than `most`.

    A compiler that doesn't work takes no time: whoever compiles then is told why.
    """
    command = [sys.executable, "-c", "from resnet_fused.bench import variants; variants.compile_alone()"]
    given = json.dumps({**asdict(workload), "threads": torch.get_num_threads()})
    # In a group of its own, with the processes that compile for it.
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=config.environment_of_child(),
        start_new_session=True,
    )
    try:
        printed, _ = process.communicate(given, timeout=most)
        return float(printed.splitlines()[-1]) if process.returncode == 0 else 0.0
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@torch.no_grad()
def compile_alone() -> None:
    """What that process does: compiles the workload of standard input, and prints how long it took."""
    given = json.load(sys.stdin)
    torch.set_num_threads(given.pop("threads"))
    model, x = Workload(**{**given, "size": tuple(given["size"])}).make()
    start = time.perf_counter()
    make(COMPILE, model, x)()
    print(time.perf_counter() - start)


def _tensorrt(model: nn.Module, x: Tensor) -> Run:
    _need("torch_tensorrt")
    import torch_tensorrt

    x = x.contiguous(memory_format=torch.channels_last)
    try:
        # The precision is the weights' own.
        compiled = torch_tensorrt.compile(model, ir="dynamo", inputs=[x], use_explicit_typing=True)
        compiled(x)
    except Exception as error:  # TensorRT's own, which are of many kinds
        reason = str(error).strip().splitlines() or [""]
        raise Unavailable(f"Torch-TensorRT failed: {type(error).__name__}: {reason[0][:80]}") from error
    return lambda: compiled(x)


class FusedRun:
    """A call of a fused model, which can be asked what was fused in it."""

    def __init__(self, fused: nn.Module, x: Tensor) -> None:
        self._fused, self._x = fused, x

    def __call__(self) -> Any:
        return self._fused(self._x)

    def report(self) -> rf.Report:
        return rf.report(self._fused, file=io.StringIO())


def _ours(model: nn.Module, x: Tensor) -> Run:
    return FusedRun(rf.fuse(model, inplace=True), x)


def _ours_graph(model: nn.Module, x: Tensor) -> Run:
    return FusedRun(rf.fuse(model, inplace=True, cuda_graph=True), x)


def _onnxruntime(model: nn.Module, x: Tensor) -> Run:
    if x.dtype != torch.float32:
        raise Unavailable("ONNX Runtime's CPU provider has no bfloat16 or float16 convolution; float32 only")
    for package in ("onnx", "onnxruntime", "onnxscript"):
        _need(package)
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.onnx")
        torch.onnx.export(model, (x,), path, dynamo=True, verbose=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    array = x.numpy()
    return lambda: torch.from_numpy(session.run(None, {name: array})[0])


def _openvino(model: nn.Module, x: Tensor) -> Run:
    _need("openvino")
    if x.dtype == torch.float16:
        raise Unavailable("OpenVINO's CPU plugin is compared in float32 and bfloat16 only")
    import openvino

    precision = {torch.float32: "f32", torch.bfloat16: "bf16"}[x.dtype]
    x = x.float()
    core = openvino.Core()
    converted = openvino.convert_model(model.float(), example_input=x, input=[list(x.shape)])
    settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": precision}
    compiled = core.compile_model(converted, "CPU", {**settings, "PERFORMANCE_HINT": "LATENCY"})
    request, array = compiled.create_infer_request(), x.numpy()
    return lambda: torch.from_numpy(request.infer([array], share_inputs=True)[0])


def _need(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        install = "torch_tensorrt" if package == "torch_tensorrt" else "'resnet_fused[peers]'"
        raise Unavailable(f"{package} is not installed; pip install {install}")


_MAKERS: dict[str, Callable[[nn.Module, Tensor], Run]] = {
    EAGER: _eager,
    CHANNELS_LAST: _channels_last,
    COMPILE: _compile,
    COMPILE_GRAPHS: functools.partial(_compile, graphs=True),
    OURS: _ours,
    OURS_GRAPH: _ours_graph,
    GPU_PEERS["max-autotune"]: functools.partial(_compile, graphs=True, tuned=True),
    GPU_PEERS["tensorrt"]: _tensorrt,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}
