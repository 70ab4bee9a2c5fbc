"""basic_block: two convolutions and a shortcut, the block of ResNet-18 and -34.

Source: He et al., Deep Residual Learning for Image Recognition, 2015, figure 5.
"""

from __future__ import annotations

from resnet_fused.ops.block import define

basic_block = define("basic_block", main=2)
