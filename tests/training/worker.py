"""What one of several processes does; test_processes.py starts them with torchrun. Each job ends with an assertion."""

from __future__ import annotations

import copy
import gc
import os
import sys

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import resnet_fused as rf
from resnet_fused.fusion import batch_norm as fused_norm

CL = torch.channels_last


def model() -> nn.Module:
    torch.manual_seed(0)
    blocks = nn.Sequential(
        rf.BasicBlock(8, 8), rf.BasicBlock(8, 12, 2), rf.Bottleneck(12, 4), nn.Flatten(), nn.Linear(16 * 16, 5)
    )
    return blocks.to(memory_format=CL)


def batch(world: int, per_process: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    count = world * per_process
    return torch.randn(count, 8, 8, 8).contiguous(memory_format=CL), torch.arange(count) % 5


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    full = lambda p: p.full_tensor() if hasattr(p, "full_tensor") else p  # noqa: E731 — FSDP2's parameters are DTensors
    return {name.removeprefix("module."): full(p.grad) for name, p in model.named_parameters()}


def compare(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=2e-4, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")


def synchronised(sharded: bool, memory_efficient: bool = False) -> None:
    """SyncBatchNorm on our blocks over all processes is one process with the whole batch: gradients and statistics."""
    rank, world = dist.get_rank(), dist.get_world_size()
    whole = model()
    x, target = batch(world)
    F.cross_entropy(whole(x), target).backward()

    parts = nn.SyncBatchNorm.convert_sync_batchnorm(model())
    assert isinstance(parts[0].bn1, nn.SyncBatchNorm)
    for block in parts[:3]:
        block.memory_efficient = memory_efficient
    if sharded:
        parts.to(memory_format=torch.contiguous_format)  # the only one that fully_shard takes
        for block in parts[:3]:
            fully_shard(block)
        fully_shard(parts)
    own = slice(3 * rank, 3 * rank + 3)
    F.cross_entropy(parts(x[own]), target[own]).backward()
    if not sharded:
        # As DistributedDataParallel does, which itself refuses SyncBatchNorm on the CPU.
        for p in parts.parameters():
            dist.all_reduce(p.grad)
            p.grad /= world
    compare(gradients(parts), gradients(whole))
    buffers = dict(parts.named_buffers())
    for name, value in whole.named_buffers():
        torch.testing.assert_close(buffers[name], value, rtol=1e-4, atol=1e-5)


def uneven() -> None:
    """Batches of different sizes, one of them empty: the statistics are those of all values together."""
    rank = dist.get_rank()
    sizes = [4, 0, 1, 2][: dist.get_world_size()]
    x, dy = torch.randn(2, sum(sizes), 6, 3, 3).unbind(0)
    dist.broadcast(x, 0)
    dist.broadcast(dy, 0)
    norm = nn.BatchNorm2d(6)
    whole = x.clone().requires_grad_()
    norm(whole).relu().backward(dy)
    first = sum(sizes[:rank])
    own = slice(first, first + sizes[rank])
    part = x[own].clone().requires_grad_()
    shared = nn.SyncBatchNorm(6)
    fused_norm.bn_relu(shared, part).backward(dy[own])
    torch.testing.assert_close(part.grad, whole.grad[own], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(shared.running_var, norm.running_var)
    total = shared.weight.grad.clone()
    dist.all_reduce(total)
    torch.testing.assert_close(total, norm.weight.grad, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="SyncBatchNorm"):
        torch.autograd.grad(fused_norm.bn_relu(shared, part).sum(), part, create_graph=True)


def unsynchronised() -> None:
    """Plain batch norms under DistributedDataParallel: each process has its own statistics, gradients are averaged."""
    rank, world = dist.get_rank(), dist.get_world_size()
    x, target = batch(world)
    parts = DistributedDataParallel(model(), broadcast_buffers=False)
    F.cross_entropy(parts(x[3 * rank : 3 * rank + 3]), target[3 * rank : 3 * rank + 3]).backward()
    each = []
    for i in range(world):
        alone = model()
        F.cross_entropy(alone(x[3 * i : 3 * i + 3]), target[3 * i : 3 * i + 3]).backward()
        each.append(gradients(alone))
    compare(gradients(parts), {name: torch.stack([g[name] for g in each]).mean(0) for name in each[0]})


def compiled() -> None:
    """A step compiled with fullgraph has the statistics of all processes as well."""
    x, target = batch(dist.get_world_size())
    own = slice(3 * dist.get_rank(), 3 * dist.get_rank() + 3)
    eager = nn.SyncBatchNorm.convert_sync_batchnorm(model())
    other = copy.deepcopy(eager)
    F.cross_entropy(eager(x[own]), target[own]).backward()
    F.cross_entropy(torch.compile(other, fullgraph=True, backend="aot_eager")(x[own]), target[own]).backward()
    compare(gradients(other), gradients(eager))


def fused() -> None:
    """A model that was fused within DistributedDataParallel."""
    x, _ = batch(1)
    parts = DistributedDataParallel(model()).eval()
    with torch.no_grad():
        torch.testing.assert_close(rf.fuse(parts)(x), parts(x), rtol=1e-4, atol=1e-5)


def plain_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
    )


def fused_for_training() -> None:
    """rf.fuse_training: gradients of DistributedDataParallel; statistics of all processes, one of which has no batch."""
    rank, world = dist.get_rank(), dist.get_world_size()
    x, target = batch(world)
    own = slice(3 * rank, 3 * rank + 3)
    each = [DistributedDataParallel(m, broadcast_buffers=False) for m in (rf.fuse_training(plain_model()), plain_model())]
    for parts in each:
        F.cross_entropy(parts(x[own]), target[own]).backward()
    compare(gradients(each[0]), gradients(each[1]))

    whole, shared = plain_model(), rf.fuse_training(nn.SyncBatchNorm.convert_sync_batchnorm(plain_model()))
    count = 3 * (world - 1)
    F.cross_entropy(whole(x[:count]), target[:count], reduction="sum").backward()
    own = slice(min(3 * rank, count), min(3 * rank + 3, count))
    F.cross_entropy(shared(x[own]), target[own], reduction="sum").backward()
    for p in shared.parameters():
        dist.all_reduce(p.grad)
    compare(gradients(shared), gradients(whole))
    for got, want in zip(shared.buffers(), whole.buffers(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def death() -> None:
    """The last process dies; the others get the group's error."""
    if dist.get_rank() == dist.get_world_size() - 1:
        os._exit(7)
    fused_norm.bn_relu(nn.SyncBatchNorm(4), torch.randn(2, 4, 3, 3))


def everything() -> None:
    synchronised(False)
    synchronised(False, memory_efficient=True)
    synchronised(True)
    uneven()
    unsynchronised()
    compiled()
    fused()
    fused_for_training()


JOBS = {"everything": everything, "death": death}

if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    JOBS[sys.argv[1]]()
    # Models that are held by cycles hold groups, and a group that is left to the end of the process may abort it there.
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()
