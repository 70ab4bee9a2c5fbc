"""Several processes, started with torchrun on this machine over gloo, against one process with the whole batch."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision

import resnet_fused as rf

WORKER = Path(__file__).with_name("worker.py")
ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(
        not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
        reason="this PyTorch has no gloo (torch.distributed.is_gloo_available()); install a build with it",
    ),
]


def run(job: str, processes: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", WORKER, job]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_together_are_one_process_with_the_whole_batch(processes: int):
    """SyncBatchNorm, averaged gradients, FSDP2; uneven and empty batches; DistributedDataParallel; compiled, fused models."""
    result = run("everything", processes)
    assert result.returncode == 0, result.stderr[-4000:]


@pytest.mark.parametrize("options", [[], ["--shard"]], ids=["DistributedDataParallel", "FSDP2"])
def test_the_script_of_the_docs_trains(options: list[str], tmp_path: Path):
    """Its checkpoint has torchvision's keys and finite values, and batch norms that have seen the batches of two epochs."""
    page = (ROOT / "docs" / "many-machines.md").read_text()
    (tmp_path / "train.py").write_text(re.search(r"```python\n(# torchrun.*?)```", page, re.S)[1])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py", *options]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    weights = torch.load(tmp_path / "weights.pth", weights_only=True)
    torchvision.models.resnet18(num_classes=10).load_state_dict(weights)
    assert all(value.isfinite().all() for value in weights.values())
    assert weights["bn1.num_batches_tracked"] == 2 * 64 / 2 / 8
    torch.manual_seed(0)
    assert not torch.equal(weights["layer4.1.conv2.weight"], rf.resnet18(num_classes=10).layer4[1].conv2.weight)


def test_a_process_that_dies_gives_the_others_an_error():
    """Not a hang. Without torchrun, which would end the survivor before it could say anything."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    survivor, dying = (
        subprocess.Popen(
            [sys.executable, WORKER, "death"], env={**os.environ, **group, "RANK": rank}, stderr=subprocess.PIPE, text=True
        )
        for rank in "01"
    )
    _, message = survivor.communicate(timeout=60)
    dying.communicate(timeout=60)
    assert dying.returncode == 7
    assert survivor.returncode == 1
    assert "RuntimeError" in message
    assert "all_gather" in message or "gloo" in message.lower()
