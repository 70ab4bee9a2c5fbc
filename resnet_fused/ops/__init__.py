"""One module an op: schema, eager and fake implementation, derivative."""

import resnet_fused.ops.program  # noqa: F401 — after those that it is made of
from resnet_fused.ops.add_relu import add_relu
from resnet_fused.ops.basic_block import basic_block
from resnet_fused.ops.bn import bn
from resnet_fused.ops.bn_add_relu import bn_add_relu
from resnet_fused.ops.bn_relu import bn_relu
from resnet_fused.ops.bn_relu_conv2d import bn_relu_conv2d
from resnet_fused.ops.bottleneck import bottleneck
from resnet_fused.ops.conv2d import conv2d
from resnet_fused.ops.conv2d_bn import conv2d_bn
from resnet_fused.ops.conv2d_bn_add_relu import conv2d_bn_add_relu
from resnet_fused.ops.conv2d_bn_relu import conv2d_bn_relu
from resnet_fused.ops.stem import stem

__all__ = [
    "add_relu",
    "basic_block",
    "bn",
    "bn_add_relu",
    "bn_relu",
    "bn_relu_conv2d",
    "bottleneck",
    "conv2d",
    "conv2d_bn",
    "conv2d_bn_add_relu",
    "conv2d_bn_relu",
    "stem",
]
