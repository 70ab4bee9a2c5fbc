"""A stage of a fused model: residual blocks in a row, whose kernels run one behind the other."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from resnet_fused.backends import Kernel
from resnet_fused.backends.cpu_chain import in_a_row
from resnet_fused.modules.folding import hooks_of
from resnet_fused.modules.fused import FusedBlock
from resnet_fused.modules.settled import TakingOver
from resnet_fused.ops.common import plain


class FusedSequential(TakingOver, nn.Sequential):
    """nn.Sequential of `FusedBlock`s, which asks once before all of them what each would ask before its own kernel.

    Wherever a call is more than the blocks' kernels, because of hooks, autograd, autocast or tracing, it is nn.Sequential.
    """

    @classmethod
    def replaces(cls, module: nn.Module) -> bool:
        return type(module) is nn.Sequential and len(module) > 1 and all(type(block) is FusedBlock for block in module)

    def watched(self) -> list[dict[str, Any]]:
        dicts = [self._modules, torch_module._global_forward_pre_hooks, torch_module._global_forward_hooks]
        for block in self._modules.values():
            # With the attributes, among which someone may put a forward of his own.
            dicts += [vars(block), block._forward_pre_hooks, block._forward_hooks]
            if isinstance(block, FusedBlock):
                dicts += block.watched()
        return dicts  # type: ignore[return-value]

    def find_kernel(self, x: Tensor, residual: Tensor | None) -> Kernel | None:
        if torch_module._global_forward_pre_hooks or torch_module._global_forward_hooks or x.dim() == 3:
            return None
        blocks: list[FusedBlock] = [*self._modules.values()]  # type: ignore[list-item]
        if not blocks:
            return None
        for block in blocks:
            if type(block) is not FusedBlock or hooks_of(block) or {"forward", "_compiled_call_impl"} & vars(block).keys():
                return None
            if not plain(*block.folded_parameters()[0]):
                return None
        kernels: list[Kernel] = []

        def run(x: Tensor, residual: Tensor | None) -> Tensor:
            nonlocal kernels
            if kernels:
                for kernel in kernels:
                    x = kernel(x, None)
                return x
            # The first call finds each block's kernel for what the block before it gives.
            found: list[Kernel] = []
            for block in blocks:
                own = block.find_kernel(x, None)
                assert own is not None
                found.append(own)
                x = own(x, None)
            whole = in_a_row(found)
            kernels = found if whole is None else [whole]
            return x

        return run
