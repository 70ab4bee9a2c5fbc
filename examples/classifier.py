"""An image classifier of torchvision's, fused or stock, with the preprocessing of its weights.

The server (examples/server.py) and batch inference (examples/batch_inference_ray.py, batch_inference_torchrun.py) share it.
"""

from __future__ import annotations

import argparse
import io
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import functional as transforms

import resnet_fused as rf

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FORMATS = ("JPEG", "PNG")
MAX_PIXELS = 50_000_000
logger = logging.getLogger("classifier")


class BadImage(ValueError):
    """Bytes that are no image for the classifier; the text says why."""


class TooManyPixels(BadImage):
    """An image that would take too much memory when decoded or resized."""


@dataclass(frozen=True)
class Preprocessing:
    """What torchvision's `ImageClassification` computes, in two parts: images one by one in uint8, then arithmetic on a batch.

    The first part needs no PyTorch, so that many threads can do it; what lies between takes a quarter of the memory.

    Attributes:
        preset: `weights.transforms()` of a classifier of torchvision's.
        max_pixels: limit on the pixels of an image, as sent and as resized.
    """

    preset: Any
    max_pixels: int = MAX_PIXELS

    def decode(self, data: bytes) -> np.ndarray:
        """Decodes, resizes and crops one image.

        Args:
            data: a JPEG or PNG file. An orientation in its metadata is not applied, as in torchvision's own data sets.

        Returns:
            uint8 [height, width, 3], height and width the preset's crop size.

        Raises:
            TooManyPixels: known from the header alone, before anything is decoded.
            BadImage: data is no JPEG or PNG, or is damaged.
        """
        if not data:
            raise BadImage("The image has no bytes; send a JPEG or PNG file.")
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            self._check_size(*image.size)
            image.load()
        except BadImage:
            raise
        except Image.UnidentifiedImageError:
            raise BadImage("The bytes are neither a JPEG nor a PNG file; convert the image to one of them.") from None
        except Image.DecompressionBombError as error:
            raise TooManyPixels(str(error)) from None
        except (
            Exception
        ) as error:  # Pillow names no list: damaged files raise OSError, SyntaxError, struct.error, zlib.error, …
            raise BadImage(f"The image can't be decoded, it may be cut off or damaged: {error}") from error
        if image.mode in ("I", "F") or image.mode.startswith("I;"):
            # Pillow would clip them to 255 instead of scaling: a wrong picture, and no error.
            raise BadImage("The image has one channel of 16 bits or more; convert it to 8 bits a channel.")
        image = transforms.resize(image.convert("RGB"), self.preset.resize_size, self.preset.interpolation)
        return np.asarray(transforms.center_crop(image, self.preset.crop_size))

    def _check_size(self, width: int, height: int) -> None:
        if width * height > self.max_pixels:
            raise TooManyPixels(
                f"The image has {width} × {height} pixels; at most {self.max_pixels} are allowed. Make it smaller."
            )
        # A strip of 1 × 100,000 pixels is small itself, but its shorter side becomes that of the network's input.
        scale = self.preset.resize_size[0] / min(width, height)
        if width * height * scale**2 > self.max_pixels:
            ratio = math.ceil(max(width, height) / min(width, height))
            raise TooManyPixels(f"The image is {ratio} times as long as it is wide and too large when resized; crop it.")

    def batch(self, images: Sequence[np.ndarray], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Images from `decode` as the model's input [len(images), 3, height, width], in channels_last."""
        # Stacked as height, width, channels, they are in channels_last as soon as the axes have their usual order.
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(device)
        x = transforms.convert_image_dtype(pixels, torch.float)
        return transforms.normalize(x, self.preset.mean, self.preset.std, inplace=True).to(dtype)


@dataclass
class Classifier:
    """A model in eval mode with all that stands around it.

    Attributes:
        model: gives scores [images, len(labels)].
        labels: names of the classes.
    """

    model: nn.Module
    labels: list[str]
    preprocessing: Preprocessing
    dtype: torch.dtype
    device: torch.device

    def __call__(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Scores (logits) in float32 [len(images), len(labels)] of images that `preprocessing.decode` returned."""
        with torch.inference_mode():
            return self.model(self.preprocessing.batch(images, self.dtype, self.device)).float().cpu().numpy()

    def describe(self) -> str:
        """In one line: how many convolutions are fused."""
        try:
            report = rf.report(self.model, file=io.StringIO())
        except ValueError:
            return "stock PyTorch"
        return f"{report.fused} of {len(report.rows)} convolutions fused. {report.no_faster}".strip()


def probabilities(scores: np.ndarray) -> np.ndarray:
    """Softmax over the last axis."""
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that say which model is run; `load` takes them."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", default="resnet50", help="a classifier of torchvision.models (default: %(default)s)")
    group.add_argument(
        "--checkpoint",
        help="state dict of that model, a file that torch.save wrote. It is loaded with weights_only=True, so that no code in "
        "it can run. Without --checkpoint and --weights the weights are random: the answers mean nothing, the speed does",
    )
    group.add_argument(
        "--weights",
        help="name of weights of torchvision's, such as IMAGENET1K_V1. They are downloaded unless there is a --checkpoint, and "
        "say how images are resized, cropped and normalised, which must be as in training (default: no download, and the "
        "preprocessing of DEFAULT)",
    )
    group.add_argument("--labels", help="text file with a class's name a line, for models of other classes than ImageNet's")
    group.add_argument("--device", default="cpu", help="where the model runs: cpu, cuda, cuda:1 (default: %(default)s)")
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="type of weights and activations. Half-width types are faster on GPUs, and bfloat16 on CPUs with instructions for "
        "it, but round more: compare accuracy on your data first (default: %(default)s)",
    )
    group.add_argument("--stock", action="store_true", help="stock PyTorch in channels_last, to compare with")


def weights_of(arguments: argparse.Namespace) -> torchvision.models.WeightsEnum:
    """The weights of torchvision's that say how images are prepared and what the classes are; nothing is downloaded.

    Raises:
        ValueError: the model is unknown, no classifier, or has no weights of that name.
    """
    known = torchvision.models.get_model_weights(arguments.model)
    if arguments.weights and arguments.weights not in known.__members__:
        raise ValueError(f"--weights is {arguments.weights}; {arguments.model} has {', '.join(known.__members__)}.")
    weights = known[arguments.weights] if arguments.weights else known.DEFAULT
    if not hasattr(weights.transforms(), "crop_size"):
        raise ValueError(f"--model is {arguments.model}, which is no classifier of images; give one such as resnet50.")
    return weights


def load(arguments: argparse.Namespace, max_pixels: int = MAX_PIXELS) -> Classifier:
    """The classifier that the options of `add_arguments` describe, fused and compared with stock on random images.

    Raises:
        ValueError: the model has no weights of that name, or the checkpoint doesn't fit.
        OSError: a file can't be read.
    """
    weights = weights_of(arguments)
    labels = list(weights.meta["categories"])
    if arguments.labels:
        labels = Path(arguments.labels).read_text(encoding="utf-8").splitlines()
    if not arguments.checkpoint and not arguments.weights:
        logger.warning("Neither --checkpoint nor --weights is given: the weights are random, and the answers mean nothing.")
        torch.manual_seed(0)  # the same in every process
    downloaded = weights if arguments.weights and not arguments.checkpoint else None
    model = torchvision.models.get_model(arguments.model, weights=downloaded, num_classes=len(labels))
    if arguments.checkpoint:
        try:
            model.load_state_dict(torch.load(arguments.checkpoint, map_location="cpu", weights_only=True))
        except RuntimeError as error:
            raise ValueError(
                f"--checkpoint {arguments.checkpoint} doesn't fit {arguments.model} with {len(labels)} classes: {error}\n"
                "Give the --model that it was made with, and --labels if its classes aren't ImageNet's."
            ) from error
    device, dtype = torch.device(arguments.device), DTYPES[arguments.dtype]
    model = model.eval().to(device, dtype, memory_format=torch.channels_last)
    preprocessing = Preprocessing(weights.transforms(), max_pixels)
    if not arguments.stock:
        noise = np.random.default_rng(0).integers(0, 256, (2, *preprocessing.preset.crop_size * 2, 3), dtype=np.uint8)
        model = rf.fuse(model, example_inputs=preprocessing.batch(list(noise), dtype, device))
    return Classifier(model, labels, preprocessing, dtype, device)
