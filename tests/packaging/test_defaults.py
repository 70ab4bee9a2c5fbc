"""What a user sets as default device or dtype changes nothing of what the library computes."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import resnet_fused as rf

ROOT = Path(rf.__file__).parent
FACTORIES = {
    "arange",
    "as_tensor",
    "asarray",
    "empty",
    "empty_strided",
    "eye",
    "full",
    "linspace",
    "logspace",
    "normal",
    "ones",
}
FACTORIES |= {"rand", "randint", "randn", "randperm", "scalar_tensor", "tensor", "zeros"}

# In a process of its own, since it is the first call of a kernel that makes its constants.
SCRIPT = """
import sys, torch
import resnet_fused as rf
default, path = sys.argv[1:]
torch.manual_seed(0)
model = rf.ResNet(rf.Bottleneck, [1, 1, 1, 1], num_classes=5).to(memory_format=torch.channels_last)
images = torch.randn(2, 3, 64, 64)
mean, var = torch.zeros(3), torch.ones(3)
if default == "meta":
    torch.set_default_device(default)
elif default:
    torch.set_default_dtype(getattr(torch, default))
model(images).square().sum().backward()
results = {name: parameter.grad for name, parameter in model.named_parameters()} | dict(model.named_buffers())
model.eval()
with torch.no_grad():
    results["blocks"] = model(images)
    results["statistics"] = rf.functional.bn_relu(images, mean, var, None, None, training=True)
    for precision in ("fast", "direct"):
        for dtype in (torch.float32, torch.bfloat16):
            fused = rf.fuse(model.to(dtype), precision=precision, example_inputs=images.to(dtype))
            for backend in ("auto", "onednn", "reference"):
                with rf.use_backend(backend):
                    results[f"{precision} {dtype} {backend}"] = fused(images.to(dtype))
    model.float()
    results["verified"] = torch.tensor([layer.fused for layer in rf.verify(model, rf.fuse(model), images).layers], device="cpu")
torch.save(results, path)
"""


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> dict[str, torch.Tensor]:
    return _results("", tmp_path_factory.mktemp("plain"))


def _results(default: str, folder: Path) -> dict[str, torch.Tensor]:
    subprocess.run([sys.executable, "-c", SCRIPT, default, str(folder / "results.pt")], check=True)
    return torch.load(folder / "results.pt")


@pytest.mark.parametrize("default", ["meta", "float64", "bfloat16"])
def test_defaults_change_no_result(default, plain, tmp_path):
    results = _results(default, tmp_path)
    verified, expected = results.pop("verified"), dict(plain)
    torch.testing.assert_close(verified.float(), expected.pop("verified"), rtol=1e-2, atol=1e-9)
    assert results.keys() == expected.keys()
    for name, value in results.items():
        assert value.dtype == expected[name].dtype, name
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_tensor_is_made_on_a_named_device(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {f"torch.{name}" for name in FACTORIES}:
            assert "device" in {keyword.arg for keyword in node.keywords}, f"line {node.lineno}: {ast.unparse(node)}"
