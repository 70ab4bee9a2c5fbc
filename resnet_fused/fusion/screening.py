"""Whether the code of a forward has effects or depends on things that a recording of it would not show.

While a forward is traced, every Python function that is called is looked at before it runs: at its instructions, and at the
globals and closures that it reads. PyTorch's own code is trusted. A function that could change something outside of the module,
or that reads something which may change unseen, ends the trace with the reason.
"""

from __future__ import annotations

import builtins
import dis
import functools
import itertools
import os
import sys
import sysconfig
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

import resnet_fused
from resnet_fused.fusion.sandbox import is_immutable


class CannotTrace(BaseException):
    """A forward can't be traced; the message is the reason. No Exception, so that no `except` of a model's code takes it.

    `by_size`: whether it asked for the size of a tensor before, so that it may be traced for one size.
    """

    by_size = False


class Watched(NamedTuple):
    """A name that a traced function reads: its value must be the same object when the recording is used."""

    names: dict[str, Any]
    name: str
    value: Any


_TRUSTED = tuple(os.path.dirname(m.__file__) + os.sep for m in (torch, resnet_fused) if m.__file__)
# Code that switches autograd and autocast, functions with a backward of their own, checkpoints.
_AUTOGRAD = tuple(os.path.join(_TRUSTED[0], *path) for path in (("autograd", ""), ("amp", ""), ("utils", "checkpoint.py")))
_LIBRARY = sysconfig.get_paths()["stdlib"] + os.sep
# Of Python's library: what classes and containers run on. The rest (logging, random, time, …) has effects or changes.
_LIBRARY_FILES = (
    "collections",
    "functools",
    "typing",
    "enum",
    "contextlib",
    "dataclasses",
    "types",
    "abc",
    "operator",
    "copyreg",
)
_PURE_MODULES = ("torch", "math", "operator", "functools", "itertools", "collections", "typing", "numbers", "_operator", "enum")
# Calls of PyTorch's that change its state, or tell of it.
_IMPURE = (
    *("manual_seed", "seed", "set_", "save", "load", "_C", "compile", "backends", "profiler", "is_grad_enabled"),
    *("is_inference_mode", "is_autocast", "get_", "are_", "initial_seed", "cuda", "random"),
)
_BUILTINS = {
    *("len", "range", "enumerate", "zip", "isinstance", "issubclass", "getattr", "hasattr", "list", "tuple", "dict", "set"),
    *("frozenset", "int", "float", "bool", "str", "min", "max", "sum", "abs", "round", "sorted", "reversed", "map", "filter"),
    *(
        "any",
        "all",
        "slice",
        "super",
        "repr",
        "iter",
        "next",
        "callable",
        "divmod",
        "pow",
        "property",
        "object",
        "NotImplemented",
    ),
    *("__build_class__", "__name__", "__debug__", "Ellipsis"),
}
_STORES = {
    "STORE_GLOBAL": "assigns the global",
    "DELETE_GLOBAL": "deletes the global",
    "STORE_NAME": "assigns",
    "DELETE_ATTR": "deletes the attribute",
    "IMPORT_NAME": "imports",
}


@functools.lru_cache(maxsize=4096)
def _fault_of_code(code: types.CodeType) -> str | None:
    """Why a function's instructions rule out a recording; None if they don't."""
    before: dis.Instruction | None = None
    tries = 0
    for instruction in dis.get_instructions(code):
        name = instruction.opname
        if name in ("EXTENDED_ARG", "CACHE", "PRECALL"):
            continue
        if name in _STORES:
            return f"{_STORES[name]} {instruction.argval!r}"
        if name in ("STORE_DEREF", "DELETE_DEREF") and instruction.argval in code.co_freevars:
            return f"assigns {instruction.argval!r} of an enclosing function"
        # An attribute of a local variable is one of the module itself, which is seen afterwards, or of something new.
        if name == "STORE_ATTR" and (before is None or not before.opname.startswith(("LOAD_FAST", "COPY", "SWAP"))):
            return f"assigns the attribute {instruction.argval!r} of something else than the module"
        # An error that a stand-in for a tensor raises would take another branch than the tensor itself.
        if name in ("CHECK_EXC_MATCH", "JUMP_IF_NOT_EXC_MATCH", "SETUP_FINALLY"):
            return "handles exceptions"
        # A stand-in answers isinstance where it is called by its name, which is seen.
        if name == "MATCH_CLASS" or (name == "LOAD_GLOBAL" and instruction.argval == "isinstance" and not _calls(instruction)):
            return "asks for the type of a value"
        tries += (name == "PUSH_EXC_INFO") - (name == "WITH_EXCEPT_START")
        if name in ("YIELD_FROM", "GET_AWAITABLE"):
            return "awaits"
        before = instruction
    if tries > 0:
        return "handles exceptions"
    names = {*code.co_names}
    # Whether a value is a Tensor its stand-in answers; not of which kind.
    kinds = any((name.endswith("Tensor") and name != "Tensor") or name in ("Parameter", "Buffer") for name in names)
    if {"type", "id", "__class__"} & names or ("isinstance" in names and kinds):
        return "asks for the type of a value"
    if "autocast" in names:
        return "switches autocast"
    return None


def _passes_on(code: types.CodeType, name: str) -> bool:
    """Whether a function may do something else with an attribute of a global than call it."""
    instructions = [i for i in dis.get_instructions(code) if i.opname not in ("EXTENDED_ARG", "CACHE", "PRECALL")]
    for before, instruction, after in zip(instructions, instructions[1:], instructions[2:], strict=False):
        if instruction.argval == name and instruction.opname == "LOAD_ATTR":
            called = before.opname == "LOAD_GLOBAL" and sys.version_info >= (3, 11) and _calls(before)
            if not called and after.opname != "PUSH_NULL":
                return True
    return False


def _calls(instruction: dis.Instruction) -> bool:
    """Whether a global is loaded to be called, where Python tells."""
    return sys.version_info < (3, 11) or bool(instruction.arg and instruction.arg & 1)


@functools.lru_cache(maxsize=4096)
def _globals_read(code: types.CodeType) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Global names that a function reads, each with the attributes that are read of it in a row."""
    found: list[tuple[str, tuple[str, ...]]] = []
    name, chain = "", []
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("CACHE", "EXTENDED_ARG"):
            continue
        if name and instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            chain.append(str(instruction.argval))
            continue
        if name:
            found.append((name, tuple(chain)))
        name, chain = (str(instruction.argval), []) if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME") else ("", [])
    return tuple(dict.fromkeys(found))


class Screen:
    """What the functions called during one trace read, and the look at each before it runs.

    Args:
        training: whether the recording is for training, where code must not change what autograd does.

    Attributes:
        watched: global names that must keep their values.
        names: of all attributes that the functions ask for.
        asking: the frame that calls isinstance now, if one does.
    """

    def __init__(self, training: bool = False) -> None:
        self._training = training
        self.watched: list[Watched] = []
        self.names: set[str] = set()
        self.asking: types.FrameType | None = None
        self._seen: set[types.CodeType] = set()
        # Functions that are defined within one that was looked at: their closures are its variables.
        self._inner: set[types.CodeType] = set()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within the `with` block, this thread's calls are looked at."""
        previous = sys.getprofile()
        sys.setprofile(self._event)
        try:
            yield
        finally:
            self.asking = None
            if previous is not None and not callable(previous):
                sys.setprofile(None)
                previous.enable()  # a profiler written in C, which isn't called but enabled
            else:
                sys.setprofile(previous)

    def _event(self, frame: types.FrameType, event: str, arg: Any) -> None:
        if event != "call":
            if event == "c_call" and arg is isinstance:
                self.asking = frame
            elif event == "c_call" and arg is warnings.warn and not is_trusted(frame.f_code):
                raise CannotTrace("calls warnings.warn")
            elif self.asking is frame:
                self.asking = None
            return
        code = frame.f_code
        if self._training and code.co_filename.startswith(_AUTOGRAD):
            raise CannotTrace("changes what autograd does")
        if code in self._seen or code.co_filename.startswith(_TRUSTED):
            return
        if _of_library(code):
            file = code.co_filename[len(_LIBRARY) :].split(os.sep)[0].removesuffix(".py")
            caller = frame.f_back.f_code if frame.f_back is not None else code
            if not is_trusted(caller) and file not in _LIBRARY_FILES:
                raise CannotTrace(f"calls {code.co_name} of Python's {file}")
            return
        self._seen.add(code)
        self._look(frame)

    def _look(self, frame: types.FrameType) -> None:
        code = frame.f_code
        where = "" if code.co_name == "forward" else f"calls {code.co_name}, which "
        reason = _fault_of_code(code)
        if reason is not None:
            raise CannotTrace(where + reason)
        self.names.update(code.co_names)
        self._inner.update(c for c in code.co_consts if isinstance(c, types.CodeType))
        for name, attributes in _globals_read(code):
            names: Any = frame.f_globals
            if names.get(name) is warnings and attributes == ("warn",) and not _passes_on(code, "warn"):
                reason = None  # a call is seen, if one is made; most forwards that have one don't make it
            elif name in names:
                reason = self._fault_of_name(names, name, attributes)
            elif name in _BUILTINS or _is_exception(getattr(builtins, name, None)):
                reason = None
            else:
                reason = f"calls {name}"
            if reason is not None:
                raise CannotTrace(where + reason)
        if code not in self._inner:
            for name in code.co_freevars:
                value = frame.f_locals.get(name)
                # Code and modules don't change by themselves; a number or list of an enclosing function may.
                if name != "__class__" and not isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)):
                    raise CannotTrace(where + f"reads {name!r} of an enclosing function, which may change")

    def _fault_of_name(self, names: dict[str, Any], name: str, attributes: tuple[str, ...]) -> str | None:
        """Why reading a global, or an attribute of a module or class that is one, rules out a recording."""
        value, path = names[name], name
        self.watched.append(Watched(names, name, value))
        for attribute in attributes:
            if not isinstance(value, (types.ModuleType, type)):
                break
            if isinstance(value, types.ModuleType) and value.__name__.split(".")[0] in _PURE_MODULES:
                last = attributes[-1]
                impure = value.__name__.startswith("torch") and any(attribute.startswith(word) for word in _IMPURE)
                return f"calls {path}.{last}" if impure else None
            owners = getattr(value, "__mro__", (value,))
            owner = next((v for v in owners if attribute in vars(v)), None)
            if owner is None:
                break
            # Inherited; a class before the owner may be given one of its own.
            before = itertools.takewhile(lambda v: v is not owner, owners)  # noqa: B023
            self.watched += [Watched(vars(v), attribute, None) for v in before]
            following = vars(owner)[attribute]
            path += f".{attribute}"
            if isinstance(following, (staticmethod, classmethod)):
                return None
            value = following
            self.watched.append(Watched(vars(owner), attribute, value))
        if isinstance(value, types.BuiltinFunctionType):
            # Named tuples make themselves by tuple.__new__.
            pure = (value.__module__ or "").split(".")[0] in _PURE_MODULES or value.__self__ is tuple
            return None if pure else f"calls {path}"
        if isinstance(value, types.ModuleType):
            return None if value.__name__.split(".")[0] in _PURE_MODULES or not attributes else f"reads {path}"
        if is_immutable(value) or isinstance(value, (type, types.FunctionType)) or _is_typing(value):
            return None
        if str(getattr(type(value), "__module__", "")).startswith("torch."):
            return None  # a scripted function, a library's operator
        return f"reads the global {path!r}, which may change"


def is_trusted(code: types.CodeType) -> bool:
    """Whether a function is of PyTorch's, Python's or this library."""
    return code.co_filename.startswith(_TRUSTED) or _of_library(code)


def _of_library(code: types.CodeType) -> bool:
    """Whether a function is of Python's own library."""
    return code.co_filename.startswith((_LIBRARY, "<frozen")) and "site-packages" not in code.co_filename


def _is_exception(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, BaseException)


def _is_typing(value: Any) -> bool:
    return type(value).__module__ in ("typing", "types", "functools")
