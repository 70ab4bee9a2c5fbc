"""Modules: drop-in blocks, and the fused modules that `rf.fuse` puts into a model."""

from resnet_fused.modules.blocks import BasicBlock, Bottleneck
from resnet_fused.modules.fused import FusedBlock, FusedConv2d, FusedConv2dAdd, FusedModule, FusedStem

__all__ = ["BasicBlock", "Bottleneck", "FusedBlock", "FusedConv2d", "FusedConv2dAdd", "FusedModule", "FusedStem"]
