"""The question that residual networks answer: do deeper networks train worse, and do shortcuts help?

Trains plain and residual networks of rising depth on real images, several seeds each, and shows training error against depth
as a table and a plot. The networks are made of the library's BasicBlock, with and without the shortcut: three stages at 16, 32
and 64 channels, depth 6n + 2, as the CIFAR networks of He et al. 2015, section 4.2. Afterwards the best network is fused for
inference.

    python examples/degradation.py                        handwritten digits (scikit-learn ships them), a few minutes on 2 cores
    python examples/degradation.py --data cifar10 --root ~/data --epochs 30 --size 32     CIFAR-10, where it is on disk
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

import resnet_fused as rf
from resnet_fused.fusion.batch_norm import bn_relu

CHANNELS_LAST = torch.channels_last


class PlainBlock(nn.Module):
    """The layers of rf.BasicBlock without the shortcut: relu(bn2(conv2(relu(bn1(conv1(x))))))."""

    def __init__(self, inplanes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)

    def forward(self, x: Tensor) -> Tensor:
        return bn_relu(self.bn2, self.conv2(bn_relu(self.bn1, self.conv1(x))))


def network(depth: int, residual: bool, in_channels: int, width: int = 16) -> nn.Module:
    """A network of 6n + 2 layers: a convolution, three stages of n blocks, a classifier."""
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"depth is {depth}; it must be 6n + 2 with n at least 1, such as 20, 32, 44, 56.")
    block = rf.BasicBlock if residual else PlainBlock
    layers: list[nn.Module] = [
        nn.Conv2d(in_channels, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
    ]
    planes = width
    for stage in range(3):
        for i in range((depth - 2) // 6):
            layers.append(block(planes, width << stage, 2 if stage > 0 and i == 0 else 1))
            planes = width << stage
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(planes, 10))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model.to(memory_format=CHANNELS_LAST)


@dataclass
class Data:
    """Images (N, C, H, W) in channels_last and labels, for training and for test."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


def digits() -> Data:
    """scikit-learn's 1797 handwritten digits, 8×8 grey pixels; every fourth is for test."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(raw.target)
    test = torch.arange(len(labels)) % 4 == 3
    return Data(*(t.contiguous() for t in (images[~test], labels[~test], images[test], labels[test])))


def cifar10(root: Path, size: int) -> Data:
    """CIFAR-10 from `root`, as torchvision lays it out; it is not downloaded."""
    from torchvision.datasets import CIFAR10

    def load(train: bool) -> tuple[Tensor, Tensor]:
        raw = CIFAR10(str(root), train=train, download=False)
        images = torch.tensor(raw.data).permute(0, 3, 1, 2).float() / 64 - 2
        images = F.interpolate(images, size=(size, size), mode="area") if size != 32 else images
        return images.contiguous(memory_format=CHANNELS_LAST), torch.tensor(raw.targets)

    return Data(*load(True), *load(False))


@dataclass
class Run:
    """One trained network; errors are shares of wrong answers."""

    depth: int
    residual: bool
    seed: int
    train_error: float
    test_error: float
    loss: float
    model: nn.Module


def train(depth: int, residual: bool, seed: int, data: Data, epochs: int, batch: int, step: Progress, task: int) -> Run:
    """Trains by SGD with momentum and a one-cycle learning rate. The errors are those of the trained network in eval mode."""
    torch.manual_seed(seed)
    model = network(depth, residual, data.train.shape[1]).train()
    count = len(data.train) // batch * batch
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=epochs * count // batch)
    for _ in range(epochs):
        order = torch.randperm(len(data.train))[:count]
        for chosen in order.split(batch):
            optimizer.zero_grad(set_to_none=True)
            loss = F.cross_entropy(model(data.train[chosen]), data.train_labels[chosen])
            loss.backward()
            optimizer.step()
            schedule.step()
        step.update(task, advance=1)
    train_error, final = evaluate(model, data.train, data.train_labels)
    test_error, _ = evaluate(model, data.test, data.test_labels)
    return Run(depth, residual, seed, train_error, test_error, final, model)


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Share of wrong answers and mean loss, in eval mode."""
    model.eval()
    answers = torch.cat([model(part) for part in images.split(512)])
    wrong = (answers.argmax(1) != labels).float().mean().item()
    return wrong, F.cross_entropy(answers, labels).item()


def kind(residual: bool) -> str:
    return "residual" if residual else "plain"


def table(runs: list[Run]) -> Table:
    """A row for each depth and kind: mean and range over seeds."""
    result = Table(title="Degradation: training error against depth", title_justify="left")
    for column in ("network", "depth", "training error", "range", "training loss", "test error"):
        result.add_column(column, justify="left" if column == "network" else "right")
    for residual in (False, True):
        for depth in sorted({r.depth for r in runs}):
            own = [r for r in runs if (r.depth, r.residual) == (depth, residual)]
            errors = [100 * r.train_error for r in own]
            result.add_row(
                kind(residual),
                str(depth),
                f"{statistics.mean(errors):.2f} %",
                f"{min(errors):.2f} – {max(errors):.2f}",
                f"{statistics.mean(r.loss for r in own):.4f}",
                f"{100 * statistics.mean(r.test_error for r in own):.2f} %",
                end_section=depth == max(r.depth for r in runs),
            )
    return result


def plot(runs: list[Run], path: Path) -> None:
    """Training error against depth, a point for each seed and a line through the means."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 3.4), layout="constrained")
    depths = sorted({r.depth for r in runs})
    for residual, color in ((False, "#c0392b"), (True, "#2471a3")):
        own = [r for r in runs if r.residual == residual]
        axes.scatter([r.depth for r in own], [100 * r.train_error for r in own], s=12, color=color, alpha=0.5)
        means = [statistics.mean(100 * r.train_error for r in own if r.depth == depth) for depth in depths]
        axes.plot(depths, means, color=color, label=kind(residual))
    axes.set(xlabel="depth (layers)", ylabel="training error (%)", xticks=depths)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def by_modules(model: nn.Module, x: Tensor) -> Tensor:
    """The network in stock PyTorch: every convolution, batch norm, addition and ReLU by itself."""
    for layer in model.children():
        if isinstance(layer, PlainBlock | rf.BasicBlock):
            y = layer.bn2(layer.conv2(F.relu(layer.bn1(layer.conv1(x)))))
            if isinstance(layer, rf.BasicBlock):
                y = y + (x if layer.downsample is None else layer.downsample(x))
            x = F.relu(y)
        else:
            x = layer(x)
    return x


@torch.no_grad()
def fuse(best: Run, data: Data, console: Console) -> None:
    """Fuses the best network for inference: the same predictions, and how much faster they come."""
    model = best.model.eval()
    fused = rf.fuse(model)
    images = data.test[:256].contiguous(memory_format=CHANNELS_LAST)
    expected, got = by_modules(model, data.test), fused(data.test)
    same = (got.argmax(1) == expected.argmax(1)).sum().item()
    times: dict[str, list[float]] = {"stock": [], "fused": []}
    for _ in range(11):
        for name, run in (("stock", lambda: by_modules(model, images)), ("fused", lambda: fused(images))):
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    before, after = (1e3 * statistics.median(times[name]) for name in ("stock", "fused"))
    console.print(
        f"Best: {kind(best.residual)}, {best.depth} layers, seed {best.seed}, test error {100 * best.test_error:.2f} %. Fused, "
        f"it gives the same class for {same} of {len(expected)} test images (largest difference of a logit "
        f"{(got - expected).abs().max().item():.1e}), {before / after:.2f}× as fast: {before:.1f} ms became {after:.1f} ms "
        f"for {len(images)} images on the CPU."
    )


def main(arguments: list[str] | None = None) -> list[Run]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[20, 32, 44, 56], help="layers, 6n + 2 (20 32 44 56)")
    parser.add_argument("--seeds", type=int, default=3, help="networks trained of each kind and depth (%(default)s)")
    parser.add_argument("--epochs", type=int, default=6, help="of each network (%(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="images of a step (%(default)s)")
    parser.add_argument("--data", choices=["digits", "cifar10"], default="digits", help="what to train on (%(default)s)")
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder of CIFAR-10, as torchvision lays it out")
    parser.add_argument("--size", type=int, default=16, help="pixels that CIFAR-10 is shrunk to (%(default)s)")
    parser.add_argument("--plot", type=Path, default=Path("bench-results/degradation.png"), help="PNG (%(default)s)")
    options = parser.parse_args(arguments)
    if options.data == "digits":
        torch.set_num_threads(1)  # 8×8 pixels are too little work for several
    data = digits() if options.data == "digits" else cifar10(options.root, options.size)
    console = Console() if sys.stdout.isatty() else Console(width=110)
    runs = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        total = 2 * len(options.depths) * options.seeds * options.epochs
        task = progress.add_task("epochs", total=total)
        for depth in options.depths:
            for residual in (False, True):
                for seed in range(options.seeds):
                    progress.update(task, description=f"{kind(residual)} {depth}, seed {seed}")
                    runs.append(train(depth, residual, seed, data, options.epochs, options.batch, progress, task))
    console.print(table(runs))
    plot(runs, options.plot)
    console.print(f"Plot: {options.plot}")
    fuse(min(runs, key=lambda run: (run.test_error, run.loss)), data, console)
    return runs


if __name__ == "__main__":
    main()
