"""Fuse a torchvision model for serving: check it, see what was done, save it, and load it again.

python examples/serve_fused.py [--model resnet50] [--checkpoint weights.pth] [--size 224]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
import torchvision

import resnet_fused as rf


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Fuse a torchvision model for serving.")
    parser.add_argument("--model", default="resnet50", help="torchvision model (%(default)s)")
    parser.add_argument("--checkpoint", type=Path, help="state dict of the model; random weights without it")
    parser.add_argument("--size", type=int, default=224, help="height and width of the images, pixels (%(default)s)")
    arguments = parser.parse_args(argv)

    model = torchvision.models.get_model(arguments.model).eval()
    if arguments.checkpoint is not None:
        model.load_state_dict(torch.load(arguments.checkpoint, weights_only=True))
    images = torch.randn(4, 3, arguments.size, arguments.size)

    fused = rf.fuse(model, example_inputs=images)
    print(rf.verify(model, fused, images))
    rf.report(fused)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pt"
        # The keys are stock's: the file serves the plain model too. One of the whole model would run code when it is loaded.
        torch.save(fused.state_dict(), path)
        # Not under inference_mode, where parameters are made that don't count their changes: such a model runs as stock.
        again = torchvision.models.get_model(arguments.model).eval()
        again.load_state_dict(torch.load(path, weights_only=True))
        served = rf.fuse(again)
    with torch.inference_mode():
        print("loaded again, same answer:", torch.equal(served(images), fused(images)))


if __name__ == "__main__":
    main()
