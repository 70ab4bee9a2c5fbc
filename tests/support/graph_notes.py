"""CUDA's graphs, emulated on the CPU.

Within a capture every operation is noted with its tensors, and a replay runs the notes again into the same results, as a GPU
would. Results of the capture itself are spoilt, because a GPU only tuning_cache.
"""

from __future__ import annotations

import torch
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode


def memory(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()


def read(args, kwargs) -> set[int]:
    """Memory of an operation's arguments."""
    return {memory(t) for t in _pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}


class Notes(TorchDispatchMode):
    """Notes operations of a capture, and repeats them. What they return of their arguments' memory is as it is."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        results = operation(*args, **(kwargs or {}))
        self.operations.append((operation, args, kwargs or {}, results))
        return results

    def replay(self):
        # Results made in inference mode can be written in it alone.
        with torch.inference_mode():
            for operation, args, kwargs, results in self.operations:
                again = _pytree.tree_leaves(operation(*args, **kwargs))
                for old, new in zip(_pytree.tree_leaves(results), again, strict=True):
                    if isinstance(old, torch.Tensor) and memory(old) not in read(args, kwargs):
                        old.copy_(new)

    def spoil(self):
        """Makes NaN of what the capture computed: a GPU only tuning_cache."""
        for _, args, kwargs, results in self.operations:
            for leaf in _pytree.tree_leaves(results):
                if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and memory(leaf) not in read(args, kwargs):
                    leaf.detach().fill_(torch.nan)
