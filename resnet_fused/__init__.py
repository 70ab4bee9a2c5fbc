"""Fused kernels that make ResNet-family networks faster in PyTorch without changing what they compute.

import resnet_fused as rf
model = rf.fuse(torchvision.models.resnet50(weights="DEFAULT").eval())   # inference
model = torchvision.models.ResNet(rf.Bottleneck, [3, 4, 6, 3])           # drop-in block, training and inference
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from resnet_fused import functional
from resnet_fused.backends import BackendError, available_backends, use_backend
from resnet_fused.fusion.freeze import freeze
from resnet_fused.fusion.fuse import fuse
from resnet_fused.fusion.installing import fuse_training, unfuse
from resnet_fused.fusion.report import Report, report
from resnet_fused.tuning import Tuning, tune
from resnet_fused.verification.model import Verification, verify

if TYPE_CHECKING:
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
    from resnet_fused.modules.drop_ins import BasicBlock, Bottleneck

__version__ = "0.2.0"

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
    "freeze",
    "functional",
    "fuse",
    "fuse_training",
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


if not TYPE_CHECKING:  # so that type checkers know which names there are

    def __getattr__(name: str) -> Any:
        # Blocks and models import torchvision, where it is installed, and so only when one is asked for.
        if name == "models" or name in __all__:
            models = importlib.import_module("resnet_fused.models")
            return models if name == "models" else getattr(models, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
