"""Packages that AOTInductor compiles of fused models, in Python."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch
import torchvision
from support.processes import run_python
from support.tolerances import assert_as_good_as_stock

import resnet_fused as rf

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler; install g++"),
]


def test_a_package_is_served_by_another_process(trained, tmp_path: Path):
    model = trained(torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5))
    batches = [torch.randn(n, 3, 40, 48) for n in (4, 7)]
    with torch.no_grad():
        exported = torch.export.export(rf.fuse(model), (batches[0],), dynamic_shapes=({0: torch.export.Dim.AUTO},))
        results = [(model(x), copy.deepcopy(model).double()(x.double())) for x in batches]
    package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "model.pt2"))
    torch.save(batches, tmp_path / "inputs.pt")
    run_python(
        "import sys, torch\n"
        "import resnet_fused\n"
        "model = torch._inductor.aoti_load_package(sys.argv[1])\n"
        "torch.save([model(x) for x in torch.load(sys.argv[2])], sys.argv[3])\n",
        *(package, tmp_path / "inputs.pt", tmp_path / "outputs.pt"),
    )
    for y, (want, truth) in zip(torch.load(tmp_path / "outputs.pt"), results, strict=True):
        assert_as_good_as_stock(y, want, truth)
