"""Runs a scenario on one copy of a model and writes down everything that a user could see of it."""

from __future__ import annotations

import copy
import hashlib
import io
import linecache
import os
import pickle
import random
import sys
import tempfile
import threading
import types
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import resnet_fused as rf
from fuzz.grammar import Program
from fuzz.snapshots import Aliases, Event, Leaves, flatten, modes, state

Fuse = Callable[..., nn.Module]


class Halved(nn.Module):
    """A parametrization."""

    def forward(self, w: Tensor) -> Tensor:
        return w * 0.5


def load(program: Program, name: str) -> types.ModuleType:
    """Executes the source as a module of that name, with or without a file that inspect can read."""
    module = types.ModuleType(name)
    path = "<string>"
    if program.has_source:
        path = os.path.join(tempfile.gettempdir(), f"{name}_{os.getpid()}.py")
        lines = program.source.splitlines(keepends=True)
        linecache.cache[path] = (len(program.source), None, lines, path)
        module.__file__ = path
    sys.modules[name] = module
    exec(compile(program.source, path, "exec"), module.__dict__)
    return module


def unload(module: types.ModuleType) -> None:
    sys.modules.pop(module.__name__, None)
    linecache.cache.pop(getattr(module, "__file__", ""), None)


@torch.no_grad()
def randomize_norms(model: nn.Module) -> None:
    """Statistics and parameters as after training, negative and zero gamma included; kept the same for every dtype."""
    for module in model.modules():
        if isinstance(getattr(module, "running_var", None), Tensor):
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 1.5)
            if module.weight is not None:
                module.weight.uniform_(0.5, 1.5)
                module.weight.view(-1)[0] *= -1
                if len(module.weight) > 4:
                    module.weight.view(-1)[-1] = 0
                module.bias.normal_(std=0.2)


class Driver:
    """One side of a trial.

    Args:
        program: the model.
        name: of the side, "stock", "ours" or "truth"; the last runs in float64.
        seed: of parameters and inputs.
        fuse: what `fuse(m)` of the scenario does.
    """

    def __init__(self, program: Program, name: str, seed: int, fuse: Fuse) -> None:
        self.program, self.name, self.seed = program, name, seed
        self.events: list[Event] = []
        self.errors: dict[int, BaseException] = {}
        self.step = 0
        self.label = ""
        self.kept: list[tuple[str, Any]] = []
        self.handles: list[Any] = []
        self._fuse = fuse
        self.double = name == "truth"
        self.module = load(program, f"fuzz_generated_{name}")
        torch.manual_seed(seed)
        self.model = self.module.build()
        randomize_norms(self.model)
        if self.double:
            self.model.double()
        self.namespace = self._namespace()

    def _namespace(self) -> dict[str, Any]:
        return {
            "m": self.model,
            "nn": nn,
            "torch": torch,
            "F": torch.nn.functional,
            "copy": copy,
            "pickle": pickle,
            "types": types,
            "prune": prune,
            "parametrize": parametrize,
            "parametrizations": parametrizations,
            "Halved": Halved,
            "g": self.module,
            "DTYPE": torch.float64 if self.double else torch.float32,
            "fuse": self.fuse,
            "image": self.image,
            "call": self.call,
            "grads": self.grads,
            "threads": self.threads,
            "functional": self.functional,
            "randomized": self.randomized,
            "fresh": self.fresh,
            "cast": self.cast,
            "at": lambda model, path: model.get_submodule(path),
            "record": self.record,
            "channels": channels,
            "keep": self.handles.append,
            "handles": self.handles,
        }

    def run(self, steps: list[str]) -> list[Event]:
        """Runs all steps. An exception ends a step, and the next goes on from there."""
        try:
            for self.step, text in enumerate(steps):
                torch.manual_seed(self.seed * 1000 + self.step)
                self.label = "autocast" if "autocast" in text else "plain"
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    self.run_step(text)
            # Results of autocast are compared as they were when they came.
            self.step, self.label = len(steps), "autocast" if any("autocast" in text for text in steps) else "plain"
            # What was returned earlier is still what it was, or what stock's has become.
            self.add("earlier results", {k: v for name, value in self.kept for k, v in flatten(value, name).items()})
            return self.events
        finally:
            for handle in self.handles:
                if hasattr(handle, "remove"):
                    handle.remove()
            torch.set_grad_enabled(True)
            unload(self.module)

    def run_step(self, text: str) -> None:
        try:
            exec(compile(text, f"<step {self.step}>", "exec"), self.namespace)
        except Exception as error:
            self.add("exception", {"type": type(error).__name__}, error)
        model = self.namespace["m"]
        self.add("state", state(model))
        self.add("globals", {k: v for n in ("LOG", "COUNTS", "SEEN") for k, v in flatten(getattr(self.module, n), n).items()})
        random_state = hashlib.sha1(torch.random.get_rng_state().numpy().tobytes()).hexdigest()[:8]
        self.add("modes", modes() | {"random numbers": random_state, "python random": hash(random.getstate())})

    def add(self, label: str, leaves: Leaves, error: BaseException | None = None) -> None:
        self.events.append(Event(self.step, f"{label} ({self.label})" if self.label != "plain" else label, leaves))
        if error is not None:
            self.errors[self.step] = error

    # What scenarios call

    def fuse(self, model: nn.Module, **options: Any) -> nn.Module:
        return self._fuse(model, **options)

    def record(self, label: str, value: Any) -> None:
        self.add(label, flatten(value, label))

    def image(self, n: int = 1, form: str = "plain", h: int = 0, w: int = 0, k: int = 0, c: int = 0) -> Any:
        """An image of the model's shape, or of another height and width, in one of many forms."""
        channels, height, width = self.program.shape
        c, h, w = c or channels, h or height, w or width
        generator = torch.Generator().manual_seed(self.seed * 31 + k)
        dtype = torch.float64 if self.double else torch.float32

        def make(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        if form == "expanded":
            return make(1, c, h, w).expand(n, c, h, w)
        if form == "sliced":
            return make(n, c, h + 3, w + 3)[:, :, 1 : h + 1, 2 : w + 2]
        if form == "channels":
            return make(n, c + 2, h, w)[:, 1 : c + 1]
        if form == "strided":
            return make(n, c, 2 * h, 2 * w)[:, :, ::2, ::2]
        if form == "flipped":
            return make(n, c, w, h).transpose(2, 3)
        if form == "unbatched":
            return make(c, h, w)
        if form == "inference":
            with torch.inference_mode():
                return make(n, c, h, w)
        x = make(n, c, h, w)
        flat = x.view(-1)
        if form == "channels_last":
            return x.contiguous(memory_format=torch.channels_last)
        if form == "numpy":
            return torch.from_numpy(np.array(x))
        if form in ("nan", "inf", "huge") and n:
            flat[flat.numel() // 3] = {"nan": float("nan"), "inf": float("-inf"), "huge": 1e10}[form]
        elif form == "nans" and n:
            flat[:: max(flat.numel() // 3, 1)] = float("nan")
            flat[1] = float("inf")
        elif form == "requires_grad":
            x.requires_grad_()
        elif form == "nonleaf":
            x = x.requires_grad_() * 1
        elif form == "parameter":
            x = nn.Parameter(x)
        elif form == "double":
            x = x.double()
        elif form == "bfloat16":
            x = x.bfloat16().double() if self.double else x.bfloat16()
        elif form == "subclass":
            x = x.as_subclass(self.module.Tagged)
        elif form == "int":
            x = (x * 5).int()
        elif form == "list":
            return [x]
        elif form == "none":
            return None
        return x

    def call(self, model: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Calls the model and writes down its result, what became of its arguments, and what shares memory with what."""
        done, out = False, None
        try:
            out = model(*args, **kwargs)
            done = True
        finally:
            aliases = Aliases()
            leaves = flatten(args, "args", aliases) | flatten(kwargs, "kwargs", aliases)
            named = self.namespace["m"]
            for name, tensor in (*named.named_parameters(), *named.named_buffers()):
                aliases.add(f"model.{name}", tensor)
            for name, value in self.kept:
                flatten(value, name, aliases)
            if done:
                leaves |= flatten(out, "out", aliases)
            self.add("call" if done else "failed call", leaves)
            self.kept.append((f"result {len(self.kept)}", out))
        return out

    def grads(self, model: nn.Module, *args: Any, keep: bool = False, **kwargs: Any) -> None:
        """Calls, goes backward from all results, and writes down every gradient."""
        from torch.utils._pytree import tree_leaves

        out = self.call(model, *args, **kwargs)
        if out is not None and not isinstance(out, (Tensor, tuple, list, dict)):
            out = list(vars(out).values())
        generator = torch.Generator().manual_seed(5)
        loss: Any = 0
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                weights = torch.randn(leaf.shape, generator=generator).to(leaf.dtype)
                loss = loss + (leaf * weights).sum() if leaf.requires_grad else loss
        if not isinstance(loss, Tensor):
            self.record("grads", "no result requires a gradient")
            return
        loss.backward()
        found = {f"args[{i}]": a.grad for i, a in enumerate(args) if isinstance(a, Tensor) and a.is_leaf}
        found |= {name: p.grad for name, p in self.namespace["m"].named_parameters()}
        self.record("grads", found)
        if not keep:
            self.namespace["m"].zero_grad()

    def threads(self, model: nn.Module, *inputs: Any, no_grad: bool = True) -> None:
        """Calls from several threads at once; one after another where the results would depend on their order."""
        results: list[Any] = [None] * len(inputs)

        def work(i: int) -> None:
            try:
                with torch.set_grad_enabled(not no_grad):
                    results[i] = model(inputs[i])
            except Exception as error:
                results[i] = f"raised {type(error).__name__}"

        busy = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
        in_order = self.program.stateful or bool(self.handles) or any(m.training for m in model.modules())
        for thread in busy:
            thread.start()
            if in_order:
                thread.join()
        for thread in busy:
            thread.join()
        self.record("threads", results)

    def fresh(self, like: Tensor, k: int, positive: bool = False) -> Tensor:
        """Random values of a tensor's shape and dtype, the same on every side."""
        generator = torch.Generator().manual_seed(self.seed * 17 + k)
        value = torch.randn(like.shape, generator=generator) * 0.3
        return (value.abs() + 0.5 if positive else value).to(like.dtype)

    def randomized(self, model: nn.Module, k: int) -> dict[str, Tensor]:
        """Other values for the whole state dict."""
        return {
            name: self.fresh(value, k + i, name.endswith("running_var")) if value.is_floating_point() else value.clone()
            for i, (name, value) in enumerate(model.state_dict().items())
        }

    def functional(self, model: nn.Module, k: int) -> Callable[..., Any]:
        other = self.randomized(model, k)
        return lambda *args, **kwargs: torch.func.functional_call(model, other, args, kwargs)

    def cast(self, model: nn.Module, dtype: torch.dtype) -> nn.Module:
        """To a dtype; the float64 side takes over only its rounding."""
        model.to(dtype)
        return model.double() if self.double else model


def channels(module: nn.Module) -> int:
    """Input channels of a module's first convolution."""
    return next(m.in_channels for m in module.modules() if isinstance(m, nn.Conv2d))


def fused_rows(model: nn.Module) -> tuple[int, int]:
    """How many convolutions rf.fuse fused, and how many there are."""
    try:
        rows = rf.report(model, file=io.StringIO()).rows
    except ValueError:
        return 0, 0
    return sum(bool(row.op) for row in rows), len(rows)
