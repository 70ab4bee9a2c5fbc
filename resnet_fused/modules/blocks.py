"""The base of the drop-in residual blocks of drop_ins.py, whose attribute names and state-dict keys are torchvision's.

In training, and wherever a derivative may be asked for, a block runs its own convolutions, batch norms and activations. In
inference it takes the folded path: batch norms folded into the weights, the block as one op. The folded parameters are kept,
and folded anew when a parameter or buffer changed, was loaded, moved or cast, seen by its address and version counter. (A write
through `.data` changes neither; `block.train()` and `block.eval()` drop the folded parameters in any case.)
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from resnet_fused.backends import Precision
from resnet_fused.modules.folding import NotFoldable, hooks_of
from resnet_fused.modules.fused import FusedBlock, FusedConv2d
from resnet_fused.modules.norm import bn, bn_add_relu, bn_relu, bn_relu_conv2d, conv2d
from resnet_fused.ops.common import plain_eager, stamp


class _FoldedPath(NamedTuple):
    """The fused form of a block, None if it has none, and the state of the block that it was made from."""

    stamp: tuple[int, ...]
    block: FusedBlock | None


class Block(nn.Module):
    """What BasicBlock and Bottleneck share: the choice between the folded path and the block's own modules."""

    op: str
    expansion: int
    downsample: nn.Module | None
    relu: nn.Module
    _path: _FoldedPath | None

    def main_path(self) -> list[tuple[nn.Module, nn.Module]]:
        """Convolution and batch norm of each layer of the main path."""
        raise NotImplementedError

    def pairs(self) -> list[tuple[Any, Any]]:
        """Convolution and batch norm of each layer, the projection shortcut last."""
        pairs = self.main_path()
        if self.downsample is not None:
            assert isinstance(self.downsample, nn.Sequential)
            pairs.append((self.downsample[0], self.downsample[1]))
        return pairs

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_path": None}

    def train(self, mode: bool = True) -> Block:
        self._path = None
        return super().train(mode)

    def _why_not_foldable(self) -> str | None:
        """Why the block isn't any more what its constructor made: plain layers without hooks, in inference mode."""
        if type(self.relu) is not nn.ReLU:
            return f"its activation is {type(self.relu).__name__}, and only ReLU is fused"
        downsample = self.downsample
        if downsample is not None and (type(downsample) is not nn.Sequential or len(downsample) != 2):
            return "its shortcut is not a Sequential of convolution and batch norm"
        watched = [module for pair in self.pairs() for module in pair]
        watched += [module for module in (downsample, self.relu) if module is not None]
        if any(m.training for m in watched):
            return "it is in training mode; call model.eval() first"
        if any(m._forward_hooks or m._forward_pre_hooks for m in watched):
            return "one of its layers has hooks"
        return None

    def _folded(self, x: Tensor) -> FusedBlock | None:
        """The block's fused form for an input like x, or None where its own modules must run."""
        if self.training or self._why_not_foldable() is not None:
            return None
        tensors = [
            tensor
            for pair in self.pairs()
            for module in pair
            for tensor in (*module._parameters.values(), *module._buffers.values())
            if tensor is not None
        ]
        if x is None or not plain_eager(x, *tensors) or x.layout is not torch.strided:
            return None
        try:
            now = stamp(tensors)
        except RuntimeError:
            # Parameters made under inference_mode don't count their changes: what was folded could be stale.
            return None
        path = self._path
        if path is None or path.stamp != now:
            try:
                block = self.fused(channels_last=False)
            except NotFoldable:
                block = None
            path = self._path = _FoldedPath(now, block)
        return path.block

    def fused(self, precision: Precision = "fast", backend: str = "auto", channels_last: bool = True) -> FusedBlock:
        """The block's fused form, on folded copies of its parameters.

        Raises:
            NotFoldable: with the reason.
        """
        reason = self._why_not_foldable()
        if reason is not None:
            raise NotFoldable(reason)
        # Outside of inference mode, so that the folded parameters count their changes like all parameters.
        with torch.inference_mode(False), torch.no_grad():
            convs = [FusedConv2d.of(conv, norm, False, precision, backend, channels_last) for conv, norm in self.pairs()]
        if any(conv.pad for conv in convs):
            raise NotFoldable("a convolution has padding that the block's op doesn't")
        shortcut = convs.pop() if self.downsample is not None else None
        return FusedBlock(convs, shortcut)

    def forward(self, x: Tensor) -> Tensor:
        folded = self._folded(x)
        return self._unfolded(x) if folded is None else folded(x)

    def _unfolded(self, x: Tensor) -> Tensor:
        """The block by its own modules: relu(bn_n(conv_n(… relu(bn_1(conv_1(x))) …)) + downsample(x))."""
        identity = self._shortcut(x)
        layers = self.main_path()
        if type(self.relu) is not nn.ReLU or hooks_of(self.relu) is not None:
            *inner, (conv, norm) = layers
            y = x
            for inner_conv, inner_norm in inner:
                y = self.relu(bn(inner_norm, inner_conv(y)))
            return self.relu(bn(norm, conv(y)) + identity)
        y = conv2d(layers[0][0], x)
        for (_, norm), (conv, _) in itertools.pairwise(layers):
            y = bn_relu_conv2d(norm, conv, y) if self.memory_efficient else conv2d(conv, bn_relu(norm, y))
        return bn_add_relu(layers[-1][1], y, identity)

    def _shortcut(self, x: Tensor) -> Tensor:
        downsample = self.downsample
        if downsample is None:
            return x
        if type(downsample) is not nn.Sequential or len(downsample) != 2 or hooks_of(downsample) is not None:
            return downsample(x)
        conv, norm = downsample
        return bn(norm, conv2d(conv, x))
