"""Memory formats inside of a program: results are channels_last, and yet whatever is seen of them is as in stock."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.fast_paths import report
from torch import nn

import resnet_fused as rf


class Branches(nn.Module):
    """Three convolutions of one input, joined by `join`, and a convolution of what comes out."""

    def __init__(self, join, width=24):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.last = nn.Conv2d(width, 8, 1)
        self.join = join

    def forward(self, x):
        return self.last(self.join(x, F.relu(self.a(x)), self.b(x), self.c(x)))


def _in_place_on_what_is_as_in_stock(x, a, b, c):
    y = torch.flip(a, (2,))
    joined = torch.cat((y, b), 1)
    y += c
    return torch.cat((joined, y), 1)


def _in_place_on_a_slice_of_all(x, a, b, c):
    joined = torch.cat((a, b, c), 1)
    part = joined[:, :24]
    part += 1
    return joined + part


def _turned_in_place(x, a, b, c):
    turned = torch.cat((a, b, c), 1)[:, :24]
    turned.transpose_(2, 3)
    return turned * 2


def _turned_in_place_beside_the_whole(x, a, b, c):
    joined = torch.cat((a, b, c), 1)
    turned = joined[:, :24]
    turned.transpose_(2, 3)
    return joined + turned.mean()


def _slice_of_what_is_known_twice(x, a, b, c):
    joined = torch.cat((a, b, c), 1)
    part = joined.relu_()[:, :24]
    part.transpose_(2, 3)
    return joined + part.mean()


JOINS = {
    "results": (lambda x, a, b, c: torch.cat((a, b, c), 1), 24),
    "results and the input": (lambda x, a, b, c: torch.cat([a, x, c], dim=1), 24),
    "results and a pool": (lambda x, a, b, c: torch.concat((a, F.max_pool2d(x, 3, 1, 1), b), 1), 24),
    "along the rows": (lambda x, a, b, c: torch.cat((a, b, c), 2), 8),
    "one pixel": (lambda x, a, b, c: torch.cat([y.mean((2, 3), keepdim=True) for y in (a, b, c)], 1), 24),
    "scaled up": (lambda x, a, b, c: torch.cat((F.interpolate(a, scale_factor=2), F.interpolate(b, scale_factor=2)), 1), 16),
    "padded": (lambda x, a, b, c: torch.cat((F.pad(a, (0, 1, 2, 1)), F.pad(b, (1, 0, 0, 3), value=2.0)), 1), 16),
    "padded by reflection": (lambda x, a, b, c: torch.cat((F.pad(a, (0, 1, 2, 1), "reflect"), F.pad(b, (1, 0, 0, 3))), 1), 16),
    "times one number": (lambda x, a, b, c: torch.cat((a * torch.full((1,), 2.0), b + torch.ones(1, 1), c), 1), 24),
    "all by slices": (lambda x, a, b, c: torch.cat((a, b, c), 1)[:, :24, :, 0:], 24),
    "all by slices, written to": (_in_place_on_a_slice_of_all, 24),
    "all by slices, turned in place": (_turned_in_place, 24),
    "all by slices, turned in place and read whole": (_turned_in_place_beside_the_whole, 24),
    "all by slices of what is known twice": (_slice_of_what_is_known_twice, 24),
    "a part by slices": (lambda x, a, b, c: torch.cat((a, b, c), 1)[:, :23, 1:], 23),
    "normed by groups": (lambda x, a, b, c: F.group_norm(torch.cat((a, b, c), 1), 4), 24),
    "written to": (_in_place_on_what_is_as_in_stock, 24),
    "one channel": (lambda x, a, b, c: torch.cat((a[:, :1], b, c, x[:, :7]), 1), 24),
}


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(("join", "width"), JOINS.values(), ids=JOINS)
def test_joined_results_have_stocks_values_and_strides(join, width, channels_last):
    model = Branches(join, width).eval()
    fused = rf.fuse(model)
    x = torch.randn(2, 8, 7, 6)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        for _ in range(2):  # the first call settles
            got, want = fused(x.clone()), model(x.clone())
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
            assert got.stride() == want.stride()
    assert report(fused).calls_fused == 2


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@torch.no_grad()
def test_a_slice_of_all_that_is_returned_is_another_tensor_on_the_same_memory(channels_last):
    class Sliced(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

        def forward(self, x):
            joined = torch.cat((self.a(x), self.b(x)), 1)
            return joined, joined[:, :16]

    model = Sliced().eval()
    fused = rf.fuse(model)
    x = torch.randn(2, 8, 5, 5)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    for _ in range(2):
        (whole, part), want = fused(x), model(x)
        assert part is not whole
        assert part.data_ptr() == whole.data_ptr()
        assert part.stride() == whole.stride() == want[0].stride()
        torch.testing.assert_close(part, want[1], rtol=1e-5, atol=1e-5)


@pytest.mark.cpu
@torch.no_grad()
def test_a_slice_of_all_is_no_copy():
    class Sliced(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
            self.last = nn.Conv2d(24, 8, 1)

        def forward(self, x):
            return self.last(torch.cat((self.a(x), self.b(x), self.c(x)), 1)[:, :24])

    fused, one = (rf.fuse(m.eval(), backend="cpu") for m in (Sliced(), nn.Sequential(nn.Conv2d(8, 8, 3, padding=1))))
    x = torch.randn(2, 8, 16, 16)
    assert _copies(fused, x) == _copies(one, x)


@pytest.mark.parametrize("mixed", [False, True], ids=["results", "with the input"])
def test_what_is_joined_and_returned_has_stocks_strides(mixed):
    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

        def forward(self, x):
            return torch.cat((self.a(x), x if mixed else self.b(x)), 1), self.b(x)

    model = Joined().eval()
    fused = rf.fuse(model)
    x = torch.randn(2, 8, 5, 5)
    with torch.no_grad():
        for given in (x, x.contiguous(memory_format=torch.channels_last)):
            for got, want in zip(fused(given), model(given), strict=True):
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
                assert got.stride() == want.stride()


def _copies(model, x):
    """How many tensors a call copies to another memory format."""
    with torch.no_grad():
        model(x)
        with torch.profiler.profile() as profile:
            model(x)
    return sum(event.name == "aten::copy_" for event in profile.events())


@pytest.mark.cpu
def test_an_input_is_converted_once_for_all_that_read_it():
    fused = rf.fuse(Branches(JOINS["results"][0]).eval(), backend="cpu")
    one = rf.fuse(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1)).eval(), backend="cpu")
    x = torch.randn(2, 8, 16, 16)
    # Into channels_last, and of the result into stock's format.
    assert _copies(fused, x) == _copies(one, x)


@pytest.mark.cpu
def test_groups_are_normed_in_the_kernels_own_format():
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv2d(16, 8, 3)).eval()
    one = rf.fuse(nn.Sequential(nn.Conv2d(8, 8, 3)).eval(), backend="cpu")
    fused, x = rf.fuse(model, backend="cpu"), torch.randn(2, 8, 16, 16)
    assert _copies(fused, x) == _copies(one, x)
    with torch.no_grad():
        got, want = fused(x), model(x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert got.stride() == want.stride()


class WritesToASlice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.act = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.a(x)
        y = F.relu(self.b(x))
        part = torch.cat([x, y], 1)[:, :16]
        part += y
        return self.act(part)


@pytest.mark.parametrize("count", [1, 2])
@torch.no_grad()
def test_a_slice_that_is_written_to_keeps_its_strides(count):
    model = WritesToASlice().eval()
    fused, x = rf.fuse(model), torch.randn(count, 16, 7, 6)
    for _ in range(2):
        got, want = fused(x), model(x)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        assert got.stride() == want.stride()


@torch.no_grad()
def test_one_number_of_five_dimensions_gives_a_result_of_five():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3)

        def forward(self, x):
            return self.conv(x) * torch.full((1, 1, 1, 1, 1), 2.0)

    model = Scaled().eval()
    x = torch.randn(2, 8, 7, 6)
    for image in (x, x.contiguous(memory_format=torch.channels_last)):
        got, want = rf.fuse(model)(image), model(image)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        assert got.stride() == want.stride()
