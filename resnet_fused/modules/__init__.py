"""Drop-in blocks, and batch norm with what follows it for training."""

from resnet_fused.modules.blocks import BasicBlock, Bottleneck

__all__ = ["BasicBlock", "Bottleneck"]
