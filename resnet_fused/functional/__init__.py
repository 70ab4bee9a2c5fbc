"""The ops as functions of tensors, for any device, with autograd.

In training a batch norm stands by itself, with what follows it: `bn`, `bn_relu`, `bn_add_relu`.
A convolution with a batch norm in inference takes the batch norm *folded* into its parameters, once, by `fold_bn`:

    weight, bias = rf.functional.fold_bn(conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps)
    y = rf.functional.conv2d_bn_relu(x, weight, bias, stride=2, padding=3)

Inputs may be contiguous or channels_last; the result's memory format follows stock PyTorch's rule (channels_last if the input
or the weight is). Accumulation is in float32. NaN goes through every op, as in stock PyTorch.
"""

from resnet_fused.functional.batch_norm import bn, bn_add_relu, bn_relu
from resnet_fused.functional.conv import (
    add_relu,
    basic_block,
    bottleneck,
    conv2d_bn,
    conv2d_bn_add_relu,
    conv2d_bn_relu,
    fold_bn,
    stem,
)

__all__ = [
    "add_relu",
    "basic_block",
    "bn",
    "bn_add_relu",
    "bn_relu",
    "bottleneck",
    "conv2d_bn",
    "conv2d_bn_add_relu",
    "conv2d_bn_relu",
    "fold_bn",
    "stem",
]
