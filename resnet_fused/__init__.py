"""Fused kernels that make ResNet-family networks faster in PyTorch without changing what they compute.

import resnet_fused as rf
model = rf.fuse(torchvision.models.resnet50(weights="DEFAULT").eval())   # inference
model = torchvision.models.ResNet(rf.Bottleneck, [3, 4, 6, 3])           # drop-in block, training and inference
"""

from resnet_fused import functional
from resnet_fused.backends import BackendError, available_backends, use_backend
from resnet_fused.fuse import fuse
from resnet_fused.fusion.installing import unfuse
from resnet_fused.fusion.report import Report, report
from resnet_fused.models import (
    ResNet,
    convert_state_dict,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext50_32x4d,
    resnext101_32x8d,
    wide_resnet50_2,
    wide_resnet101_2,
)
from resnet_fused.modules.blocks import BasicBlock, Bottleneck
from resnet_fused.tuning import Tuning, tune
from resnet_fused.verify import Verification, verify

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "BasicBlock",
    "Bottleneck",
    "Report",
    "ResNet",
    "Tuning",
    "Verification",
    "available_backends",
    "convert_state_dict",
    "functional",
    "fuse",
    "report",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "tune",
    "unfuse",
    "use_backend",
    "verify",
    "wide_resnet50_2",
    "wide_resnet101_2",
]
