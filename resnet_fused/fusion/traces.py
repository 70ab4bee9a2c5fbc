"""The programs of one module's forward: made by traces, made again where the module isn't what it was.

One program serves inputs of any size. Where a forward asks for the size of a tensor and decides by it (padding that depends on
it, a pool for small images), a trace for each size has the sizes as numbers, and its program serves inputs of that size alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from resnet_fused import config
from resnet_fused.fusion.building import Built, build
from resnet_fused.fusion.graph import GraphProgram
from resnet_fused.fusion.guards import Structure
from resnet_fused.fusion.layers import get
from resnet_fused.fusion.screening import CannotTrace
from resnet_fused.fusion.tracing import argument_names
from resnet_fused.runtime.executor import Settings
from resnet_fused.runtime.folding import NotFoldable
from resnet_fused.runtime.kept import ByKind, Look, Unservable
from resnet_fused.runtime.parameters import with_memory
from resnet_fused.runtime.run import Run

# Traces that are made at once when a module changes; later ones wait for ever more calls, so that a module that changes at
# every call isn't traced at every call.
PROMPT_TRACES, LONGEST_WAIT = 4, 10
# Sizes for which there are programs of their own. After the first, a size gets one when it is met again.
_MOST_SIZES, _MOST_MET = 8, 64


class Traced:
    """A program, with what was made for it.

    Attributes:
        structure: what it relies on.
        tensors: those that its layers number.
        differentiable: parameters of the module, of which a derivative may be asked for.
        runs: its kernels, by the kind of input.
        look: at the values of all parameters that it uses.
    """

    def __init__(self, module: nn.Module, built: Built) -> None:
        self.built = built
        self.structure = Structure(module, built.trace, built.absorbed)
        self.differentiable = [p for p in module.parameters() if p is not None]
        sources = [path for tensor in built.derived.values() for path in tensor.sources]
        paths = dict.fromkeys(name for name in (*built.parameters, *sources) if name not in built.derived)
        self._module, self._given = module, {path: get(module, path) for path in paths}
        self._kinds = self._kinds_now()
        self.runs: ByKind[Run] = ByKind()
        self.tensors = self._tensors()
        self.look = Look(with_memory([*self._given.values()]))

    def _kinds_now(self) -> list[tuple[torch.Size, torch.dtype]]:
        return [(t.shape, t.dtype) for t in self._given.values()]

    def _tensors(self) -> list[Tensor]:
        derived = self.built.derived
        return [derived[name].value(self._module) if name in derived else self._given[name] for name in self.built.parameters]

    def values_changed(self) -> bool:
        """Takes the parameters' values as they are now; False if they aren't of the traced shapes and dtypes any more."""
        # In this order: another thread must not find the new look beside runs of the old values.
        self.runs = ByKind()
        if self._kinds_now() != self._kinds:
            return False
        if self.built.derived:
            self.tensors = self._tensors()
        self.look_again()
        return True

    def look_again(self) -> None:
        """From now on a change is one from what the parameters are now, of those whose memory wasn't released."""
        self.look = Look(with_memory([*self._given.values()]))


class Traces:
    """All programs of a module.

    Args:
        module: the module.
        settings: for the operators of graphs.

    Attributes:
        arguments: names of forward's arguments that must be given, where sizes decide.
        by_size: whether it may be worth a trace for one size.
        alone: names of convolutions whose sum is left to stock.
        untraceable: why there is no program for any size; "" if there is.
        reasons: why convolutions can't be fused, by their names, where none can.
        graph: what stands in graphs of torch.compile; None if nothing does.
    """

    def __init__(self, module: nn.Module, settings: Settings) -> None:
        self._module, self._settings = module, settings
        self._any: Traced | None = None
        self._of_sizes: dict[tuple[torch.Size, ...], Traced | None] = {}
        self._met: set[tuple[torch.Size, ...]] = set()
        self._attempts = self._wait = 0
        self.arguments: tuple[str, ...] = ()
        self.by_size = False
        self.alone: frozenset[str] = frozenset()
        self.untraceable = ""
        self.reasons: dict[str, str] = {}
        self.graph: GraphProgram | None = None

    def __iter__(self) -> Iterator[Traced]:
        """Those that there are, the one for any size last."""
        yield from [traced for traced in (*[*self._of_sizes.values()][::-1], self._any) if traced is not None]

    def of_any_size(self) -> Traced | None:
        """The program for inputs of any size; None, with `untraceable`, where there is none now."""
        traced = self._any
        if traced is None and self.by_size:
            return None
        if traced is None or traced.structure.fault() is not None:
            traced = self._trace()
        return traced

    def of_size(self, args: Sequence[Tensor]) -> Traced | None:
        """The program that was made for inputs of these sizes, if there is one that holds."""
        found = self._of_sizes.get(_sizes(args))
        if found is None or found.structure.fault() is None:
            return found
        self.forget()
        return None

    def make_for_size(self, args: Sequence[Tensor]) -> Traced | None:
        """A program for inputs of these sizes; None where it would fuse no more than that for any size, or is of no use yet."""
        sizes = _sizes(args)
        if sizes in self._of_sizes or len(self._of_sizes) >= _MOST_SIZES:
            return None
        if self._of_sizes and sizes not in self._met:
            self._met = {*list(self._met)[-_MOST_MET:], sizes}
            return None
        try:
            made = self._make(args)
        except _WITHOUT_PROGRAM as reason:
            config.logger().debug("%s isn't traced for one size: %s", type(self._module).__name__, reason)
            made = None
        except Exception:  # as in `_trace_now`
            config.logger().debug("tracing %s for one size failed", type(self._module).__name__, exc_info=True)
            made = None
        if made is not None and self._any is not None and _convolutions(made) <= _convolutions(self._any):
            made = None
        self._of_sizes[sizes] = made
        if self._any is None and not any(self._of_sizes.values()):
            self.by_size = False  # until the module is traced again
        return made

    def forget(self) -> None:
        """Drops all programs; the next call makes them again."""
        self._any, self._of_sizes, self.by_size = None, {}, False

    def leave_sums(self, names: set[str]) -> None:
        """From the next call on, leaves the sums of some convolutions to stock, and fuses what is before them."""
        self.alone |= names
        self.forget()
        self._attempts, self._wait = self._attempts - 1, 0

    def _make(self, inputs: Sequence[Tensor] | None = None) -> Traced:
        """A program, for any size or those of `inputs`.

        Raises:
            CannotTrace, NotFoldable, Unservable: there is none; the message is the reason.
        """
        # While torch.jit.trace is at work, it would record what is asked of parameters, and sizes are tensors.
        state, set_state = torch._C._get_tracing_state(), torch._C._set_tracing_state  # type: ignore[attr-defined]
        set_state(None)
        try:
            built = build(self._module, self.alone, inputs)
            if not built.groups:
                if inputs is None:
                    self.reasons, self.by_size = built.reasons, built.trace.by_size
                raise Unservable(_nothing(built))
            return Traced(self._module, built)
        finally:
            set_state(state)

    def _trace(self) -> Traced | None:
        """Traces the module's forward as it is now. None, with `untraceable`, where there is nothing to serve."""
        if self._wait > 0:
            self._wait -= 1
            return None
        self._attempts += 1
        self._wait = 2 ** min(self._attempts - PROMPT_TRACES, LONGEST_WAIT) if self._attempts > PROMPT_TRACES else 0
        self.forget()
        self.reasons = {}
        try:
            traced = self._make()
        except _WITHOUT_PROGRAM as reason:
            self.untraceable, self.graph = str(reason), None
            self.by_size = self.by_size or getattr(reason, "by_size", False)
            if self.by_size:
                self.untraceable += ", which the sizes of a call may tell"
                self.arguments = argument_names(self._module)
            else:
                self._wait = max(self._wait, 2 ** min(self._attempts, LONGEST_WAIT))
            return None
        except Exception as error:  # the model's code ran on stand-ins, and may do anything; it runs as stock
            self.untraceable = f"its forward can't be read: {type(error).__name__}: {error}"
            self.graph, self._wait = None, 2**LONGEST_WAIT
            config.logger().debug("tracing %s failed", type(self._module).__name__, exc_info=True)
            return None
        self._any, self.untraceable = traced, ""
        self.by_size, self.arguments = traced.built.trace.by_size, traced.built.trace.arguments
        self.graph = GraphProgram.of(self._module, traced.built, self._settings)
        return traced

    def for_report(self) -> Built | None:
        """A program of the forward as it is now, the last one made for a size first; None if there is nothing to serve."""
        for traced in self:
            if traced.structure.fault() is None:
                built: Built = traced.built
                return built
        # Whoever asks for a report makes no later call wait for its trace.
        (attempts, wait), self._wait = (self._attempts, self._wait), 0
        made = self._trace()
        self._attempts, self._wait = attempts, wait if made is None else 0
        return None if made is None else made.built


_WITHOUT_PROGRAM = (CannotTrace, NotFoldable, Unservable)


def _sizes(args: Sequence[Tensor]) -> tuple[torch.Size, ...]:
    return tuple(x.shape for x in args)


def _convolutions(traced: Traced) -> int:
    return sum(len(group.convolutions) for group in traced.built.groups.values())


def _nothing(built: Built) -> str:
    return next(iter({**built.trace.opaque, **built.reasons}.values()), "it has no convolution that a batch norm follows")
