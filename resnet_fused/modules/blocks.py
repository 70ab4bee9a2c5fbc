"""The base of the drop-in residual blocks of drop_ins.py, whose attribute names and state-dict keys are torchvision's.

In training, and wherever a derivative may be asked for, a block runs its own convolutions, batch norms and activations. In
inference it has a fast path, as `rf.fuse` installs it: batch norms folded into the weights, the block as one op.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from resnet_fused.fusion.batch_norm import bn, bn_add_relu, bn_relu, bn_relu_conv2d, conv2d
from resnet_fused.fusion.path import FastPath, Fusion
from resnet_fused.runtime.executor import Settings
from resnet_fused.runtime.folding import hooks_of


class Block(nn.Module):
    """What BasicBlock and Bottleneck share: the choice between the fast path and the block's own modules."""

    op: str
    expansion: int
    downsample: nn.Module | None
    relu: nn.Module
    memory_efficient: bool
    _path: FastPath | None

    def main_path(self) -> list[tuple[nn.Module, nn.Module]]:
        """Convolution and batch norm of each layer of the main path."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if "forward" in vars(self) or type(self).forward is not Block.forward:
            # Someone's own forward calls this one, so the block is more than what follows.
            return self.unfused_forward(x) if self.training else self.plain_forward(x)
        path = self._path
        if path is None or path.module is not self:
            if torch.compiler.is_compiling():
                return self.unfused_forward(x)
            path = self._path = FastPath(self, Fusion(Settings()))
        return path(x)

    def plain_forward(self, x: Tensor) -> Tensor:
        """The block as its layers compute it one by one, which is what the fast path computes in inference."""
        *inner, (conv, norm) = self.main_path()
        y = x
        for inner_conv, inner_norm in inner:
            y = self.relu(inner_norm(inner_conv(y)))
        y = norm(conv(y))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)

    def unfused_forward(self, x: Tensor) -> Tensor:
        """The block by its own modules: relu(bn_n(conv_n(… relu(bn_1(conv_1(x))) …)) + downsample(x))."""
        identity = self._shortcut(x)
        layers = self.main_path()
        if type(self.relu) is not nn.ReLU or hooks_of(self.relu) is not None:
            *inner, (conv, norm) = layers
            y = x
            for inner_conv, inner_norm in inner:
                y = self.relu(bn(inner_norm, inner_conv(y)))
            y = bn(norm, conv(y))
            y += identity  # in place, so that y's dtype stays where the shortcut has a wider one, as in torchvision
            return self.relu(y)
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
