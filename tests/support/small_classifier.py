"""A small classifier with known weights for the examples, and what it says of files."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import torch
import torchvision
from conftest import randomize_norms
from PIL import Image
from torch import Tensor

CLASSES = 10


def options(folder: Path) -> list[str]:
    """Options of the examples that say which model it is; writes its weights and labels into the folder."""
    torch.manual_seed(0)
    model = randomize_norms(torchvision.models.resnet18(num_classes=CLASSES))
    torch.save(model.state_dict(), folder / "weights.pth")
    (folder / "labels.txt").write_text("".join(f"class {i}\n" for i in range(CLASSES)))
    return ["--model", "resnet18", "--checkpoint", str(folder / "weights.pth"), "--labels", str(folder / "labels.txt")]


@torch.no_grad()
def alone(options: Sequence[str], files: Sequence[bytes]) -> tuple[Tensor, Tensor]:
    """Scores [files, CLASSES] by stock PyTorch and torchvision's own preprocessing, image by image, in float32 and float64."""
    model = torchvision.models.resnet18(num_classes=CLASSES).eval()
    model.load_state_dict(torch.load(options[3], weights_only=True))
    preset = torchvision.models.ResNet18_Weights.DEFAULT.transforms()
    images = [preset(Image.open(io.BytesIO(file)).convert("RGB"))[None] for file in files]
    stock = torch.cat([model(image) for image in images])
    return stock, torch.cat([model.double()(image.double()) for image in images])
