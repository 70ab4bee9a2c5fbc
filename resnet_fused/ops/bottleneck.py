"""bottleneck: three convolutions and a shortcut, the block of ResNet-50, -101 and -152.

Source: He et al., Deep Residual Learning for Image Recognition, 2015, figure 5.
"""

from __future__ import annotations

from resnet_fused.ops.block import define

bottleneck = define("bottleneck", main=3)
