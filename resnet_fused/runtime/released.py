"""Parameters whose memory was given back after kernels had packed them: access to their values is an error that says so."""

from __future__ import annotations

from typing import Any

from torch import nn

_METADATA = frozenset(
    (
        *("shape", "size", "dim", "ndim", "numel", "dtype", "device", "layout", "requires_grad", "is_leaf", "grad", "names"),
        *("is_floating_point", "is_complex", "is_cuda", "is_meta", "is_sparse", "is_quantized", "grad_fn", "element_size"),
        *("itemsize", "nelement", "__len__"),
    )
)


class ReleasedParameter(nn.Parameter):
    """A parameter without values. Its shape, dtype and device can be asked for."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        if name in ("__get__", "__set__", "__delete__"):
            name = getattr(getattr(func, "__self__", None), "__name__", name)
        if name in _METADATA:
            return super().__torch_function__(func, types, args, kwargs or {})
        raise RuntimeError(
            f"{name} was called on a parameter whose memory rf.fuse(release=True) gave back: only what was packed of it for "
            "inference on inputs such as example_inputs is there. To read, train, copy, save or move the model, or to call it "
            "with other kinds of inputs, fuse it without release=True."
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"ReleasedParameter(shape={tuple(self.shape)}, dtype={self.dtype})"


def release(parameter: nn.Parameter) -> None:
    """Gives back a parameter's memory. The object stays where it stands."""
    parameter.untyped_storage().resize_(0)
    parameter.__class__ = ReleasedParameter
