"""One module a family of ops: schemas, eager and fake implementations, derivatives. Only here ops have names."""

import resnet_fused.ops.program  # noqa: F401 — after those that it is made of
from resnet_fused.ops.add_relu import add_relu
from resnet_fused.ops.batch_norm import bn, bn_add_relu, bn_relu
from resnet_fused.ops.block import basic_block, bottleneck
from resnet_fused.ops.bn_relu_conv2d import bn_relu_conv2d
from resnet_fused.ops.conv2d import conv2d_bn, conv2d_bn_add_relu, conv2d_bn_relu
from resnet_fused.ops.stem import stem
from resnet_fused.ops.training_conv2d import conv2d

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
