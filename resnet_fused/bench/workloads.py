"""The models and inputs that are measured."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from resnet_fused.bench import options
from resnet_fused.runtime.folding import NORMS

DTYPES = {name: getattr(torch, name) for name in options.DTYPES}


@dataclass(frozen=True)
class Workload:
    """One model on inputs of one kind.

    Attributes:
        model: name of a torchvision model, such as "resnet50".
        batch: images.
        dtype: name of the dtype of weights and images.
        size: height and width of the images, pixels; of signals their length, of videos frames, height and width.
        device: where the model and the images are: cpu, cuda or cuda:N.
        channels: of the images.
    """

    model: str
    batch: int
    dtype: str
    size: tuple[int, ...] = (224, 224)
    device: str = "cpu"
    channels: int = 3

    def __str__(self) -> str:
        return f"{self.model}, batch {self.batch}, {self.dtype}, {'×'.join(map(str, self.size))}"

    def create(self) -> nn.Module:
        """The fresh model."""
        import torchvision

        return torchvision.models.get_model(self.model)

    def make(self) -> tuple[nn.Module, Tensor]:
        """The model in eval mode, with batch-norm statistics as after training, and a batch of noise.

        Raises:
            UserError: the model takes no images of this size, or memory doesn't suffice.
        """
        torch.manual_seed(0)
        model = self.create()
        dtype = DTYPES[self.dtype]
        try:
            settle(model, self.size, self.channels)
            x = torch.randn(self.batch, self.channels, *self.size, dtype=torch.float32, device="cpu")
            return model.eval().to(self.device, dtype), x.to(self.device, dtype)
        # What torchvision's models raise on images that they don't fit, and the allocator where memory doesn't suffice.
        except (AssertionError, RuntimeError, ValueError) as error:
            raise options.UserError(
                f"{self.model} can't run on {self.batch} images of {'x'.join(map(str, self.size))} pixels: "
                f"{str(error).splitlines()[0]}. Choose another --size, batch or model"
            ) from error


# Batch norms get their statistics from 8 images, or more smaller ones. Behind an average pool they see one value an image: the
# variance of two is close to 0 by chance, which blows up rounding errors (RexNet, SK-ResNet).
_SETTLING_IMAGES, _SETTLING_PIXELS = 8, 8 * 112 * 112


def _last_norm(block: nn.Module) -> str:
    """Name of the last batch norm of a residual block, as torchvision's networks for images and for videos have it."""
    if hasattr(block, "bn2"):
        return "bn3" if hasattr(block, "bn3") else "bn2"
    name = "conv3" if hasattr(block, "conv3") else "conv2"
    unit = getattr(block, name, None)
    return f"{name}.{len(unit) - 1}" if isinstance(unit, nn.Sequential) and isinstance(unit[-1], NORMS) else ""


@torch.no_grad()
def settle(model: nn.Module, size: tuple[int, ...], channels: int = 3) -> None:
    """Makes a fresh model's batch norms look trained, since without it the results grow out of all bounds.

    They get the statistics of what flows through them. The last batch norm of each residual block is weak, as training
    leaves it (and as zero-initialised ones begin), so that rounding errors aren't blown up from block to block.
    """
    last = {f"{path}.{name}" for path, m in model.named_modules() if (name := _last_norm(m))}
    for path, norm in model.named_modules():
        if isinstance(norm, NORMS):
            norm.momentum = 1.0
            norm.weight.uniform_(*((0.1, 0.3) if path in last else (0.5, 1.0)))
            norm.bias.normal_(std=0.1)
    model.train()
    images = max(_SETTLING_IMAGES, _SETTLING_PIXELS // math.prod(size))
    model(torch.randn(images, channels, *size, dtype=torch.float32, device="cpu"))
