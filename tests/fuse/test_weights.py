"""What rf.fuse makes of a model's weights: their memory, ties and copies, and the original left alone."""

from __future__ import annotations

import copy

import torch
import torchvision
from support.fast_paths import assert_same_model, report, rows
from torch import nn

import resnet_fused as rf

tv = torchvision.models


def test_weights_take_little_more_than_twice_the_memory(trained):
    for make in (tv.resnet18, tv.resnet50):
        model = trained(make())
        fused = rf.fuse(model)
        with torch.no_grad():
            fused(torch.randn(1, 3, 224, 224))
            fused(torch.randn(2, 3, 96, 128))  # another shape needs no other packing
        said = report(fused)
        assert said.packed_bytes > 0
        assert said.parameter_bytes == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
        assert said.parameter_bytes + said.packed_bytes <= 2.2 * said.parameter_bytes, str(said).splitlines()[-1]


class Mixed(nn.Module):
    """Fused and unfused parts, with parameters that are tied, and one that is a view of another's memory."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.bare = nn.Conv2d(8, 8, 1)
        self.head, self.tied = nn.Linear(8, 8), nn.Linear(8, 8)
        self.tied.weight = self.head.weight
        self.view = nn.Parameter(self.head.bias.detach()[:4])
        self.register_buffer("scale", torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bare(self.bn(self.conv(x)).relu()).relu().mean((2, 3))
        return self.tied(self.head(x) * self.scale) + self.view.sum()


def test_a_fused_model_shares_no_memory_with_the_original_and_keeps_ties():
    model = Mixed().eval()
    fused = rf.fuse(model)
    tensors = [{t.untyped_storage().data_ptr() for t in (*m.parameters(), *m.buffers())} for m in (model, fused)]
    assert not tensors[0] & tensors[1]
    assert fused.tied.weight is fused.head.weight
    x = torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        want = fused(x)
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
        torch.testing.assert_close(fused(x), want)


def test_each_weight_is_copied_once_and_in_place_not_at_all(monkeypatch):
    """The original and the copy are in memory at once, and nothing else of their size."""
    copied = []
    deepcopy = nn.Parameter.__deepcopy__
    monkeypatch.setattr(nn.Parameter, "__deepcopy__", lambda self, memo: copied.append(self.shape) or deepcopy(self, memo))
    model = torchvision.models.resnet18().eval()
    fused = rf.fuse(model)
    assert sorted(copied) == sorted(p.shape for p in model.parameters())
    assert fused.fc.weight.data_ptr() != model.fc.weight.data_ptr()
    copied.clear()
    addresses = [p.data_ptr() for p in model.parameters()]
    rf.fuse(model, inplace=True)
    assert not copied
    assert [p.data_ptr() for p in model.parameters()] == addresses
    assert report(model).packed_bytes == 0, "something was packed before the first call"


def test_fuse_leaves_the_original_alone_unless_inplace(trained):
    model = trained(tv.ResNet(tv.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    attributes = {name: sorted(vars(m)) for name, m in model.named_modules()}
    rf.fuse(model)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert {name: sorted(vars(m)) for name, m in model.named_modules()} == attributes
    twin = copy.deepcopy(model)
    assert rf.fuse(model, inplace=True) is model
    assert all(row.op for row in rows(model))
    assert_same_model(model, twin)
    assert rf.unfuse(model) is model
    assert {name: sorted(vars(m)) for name, m in model.named_modules()} == attributes
    assert repr(model) == repr(twin)
