"""Modules, memory and launches: what they accept, what they refuse, and what they say then."""

from __future__ import annotations

import ctypes

import numpy as np
import ptx_executor as px
import pytest
import torch

HEAD = ".version 8.0\n.target sm_80\n.address_size 64\n"
FILL = (
    HEAD
    + """.visible .entry fill(.param .u64 y, .param .f32 v, .param .align 4 .b8 pair[8]) .reqntid 32, 1, 1 {
    .reg .b64 %d<3>; .reg .b32 %r; .reg .f32 %f<3>;
    ld.param.u64 %d0, [y]; ld.param.f32 %f0, [v]; ld.param.f32 %f1, [pair+4]; add.f32 %f2, %f0, %f1;
    mov.u32 %r, %tid.x; mul.wide.u32 %d1, %r, 4; add.s64 %d2, %d0, %d1; st.global.f32 [%d2], %f2; ret; }"""
)


def test_unknown_instruction_names_kernel_and_line() -> None:
    module = px.Module(HEAD + ".visible .entry k()\n{\n .reg .b32 %r<2>;\n vadd.s32.s32.s32 %r0, %r1, %r1;\n ret;\n}\n")
    with pytest.raises(px.UnsupportedInstruction, match=r"kernel k, PTX line 7: vadd\.s32\.s32\.s32 %r0") as refused:
        module.launch("k", 1, 32, [])
    assert (refused.value.kernel, refused.value.line) == ("k", 7)


@pytest.mark.parametrize(
    "body",
    ["add.s32.made_up %r0, %r1, %r1;", "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 %r0, %r0, %r0, %r0;"],
)
def test_unknown_form_of_an_instruction_is_refused(body: str) -> None:
    module = px.Module(HEAD + ".visible .entry k() { .reg .b32 %r<2>; " + body + " ret; }")
    with pytest.raises(px.UnsupportedInstruction, match="unknown modifier"):
        module.launch("k", 1, 32, [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hello", "PTX line 1: cannot parse"),
        (HEAD + ".entry k() { add.s32 %r0 }", "PTX line 4"),
        (".version 8.0\n", "no .target"),
    ],
)
def test_text_that_is_not_ptx_is_refused(text: str, message: str) -> None:
    with pytest.raises(px.PtxSyntaxError, match=message):
        px.Module(text)


def test_scopes_hide_outer_registers() -> None:
    text = (
        HEAD
        + """.visible .entry k(.param .u64 y) { .reg .b32 %a, %b; .reg .b64 %d;
        mov.u32 %a, 1; { .reg .b32 %a; mov.u32 %a, 020; mov.u32 %b, %a; } add.u32 %b, %b, %a;
        ld.param.u64 %d, [y]; st.global.u32 [%d], %b; ret; }"""
    )
    memory = px.Memory()
    y = memory.empty(4)
    px.Module(text).launch("k", 1, 1, [y], memory=memory)
    assert memory.download(y, np.uint32, 1)[0] == 17  # 020 is octal


def test_parameters_by_value(memory: px.Memory) -> None:
    class Pair(ctypes.Structure):
        _fields_ = (("a", ctypes.c_float), ("b", ctypes.c_float))

    module, y = px.Module(FILL), memory.empty(128)
    for pair in (Pair(7, 0.5), np.float32([7, 0.5]), np.float32([7, 0.5]).tobytes()):
        module.launch("fil", 1, 32, [y, 2, pair], memory=memory)
        assert (memory.download(y, np.float32, 32) == 2.5).all()


@pytest.mark.parametrize(
    ("block", "args", "message"),
    [
        (32, [0, 1.0], r"args has 2 values, and the kernel takes \['y', 'v', 'pair'\]"),
        (32, [0, 1.0, b"1234"], "parameter pair takes 8; pass that many"),
        (32, [0, 1.0, "text"], "pass an int, a float, bytes"),
        (64, [0, 1.0, bytes(8)], r"compiled for blocks of \[32, 1, 1\]"),
        (0, [0, 1.0, bytes(8)], "block=0: pass one to three positive sizes"),
    ],
)
def test_launch_refuses_what_does_not_fit(block: int, args: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        px.Module(FILL).launch("fill", 1, block, args)


def test_kernel_that_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"kernel='other' matches 0 kernels; name one of \['fill'\]"):
        px.Module(FILL).find("other")


def test_upload_keeps_the_memory_format(memory: px.Memory) -> None:
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    address = memory.upload(image)
    assert torch.equal(memory.download(address, torch.float32, (2, 4, 5, 3)), image.permute(0, 2, 3, 1))
    back = torch.empty_like(image)
    memory.download_into(address, back)
    assert torch.equal(back, image)


def test_upload_refuses_gaps(memory: px.Memory) -> None:
    with pytest.raises(ValueError, match=r"without gaps or overlaps.*pass array.contiguous\(\)"):
        memory.upload(torch.randn(4, 6)[:, :3])
    with pytest.raises(ValueError, match="without gaps or overlaps"):
        memory.upload(torch.randn(1).expand(4))


def test_memory_grows_and_keeps_its_content(memory: px.Memory) -> None:
    first = memory.upload(np.arange(100))
    big = memory.zeros(10_000_000)
    assert big % 256 == 0
    assert memory.download(first, np.int64, 100).tolist() == list(range(100))


def test_download_outside_of_an_allocation(memory: px.Memory) -> None:
    address = memory.zeros(16)
    with pytest.raises(ValueError, match="20 bytes from there are not inside one allocation"):
        memory.download(address, np.float32, 5)
    with pytest.raises(ValueError, match="were never written"):
        memory.download(memory.empty(16), np.float32, 4)
    assert np.isnan(memory.download(memory.empty(16), np.float32, 4, allow_unwritten=True)).all()


def test_state_of_one_launch_does_not_leak_into_the_next(memory: px.Memory) -> None:
    module, y = px.Module(FILL), memory.empty(128)
    for _ in range(2):
        counters = module.launch("fill", 1, 32, [y, 1.0, bytes(8)], memory=memory)
        assert (counters.bytes_read, counters.bytes_written) == (0, 128)
        assert counters.of("global_store").requests == 1


def test_batches_of_blocks_give_one_result(memory: px.Memory) -> None:
    """More blocks than run side by side, and a last batch that is smaller."""
    text = (
        HEAD
        + """.visible .entry number(.param .u64 y) { .reg .b64 %d<3>; .reg .b32 %r<5>;
        ld.param.u64 %d0, [y]; mov.u32 %r0, %ctaid.x; mov.u32 %r1, %ntid.x; mov.u32 %r2, %tid.x;
        mad.lo.u32 %r3, %r0, %r1, %r2; mul.wide.u32 %d1, %r3, 4; add.s64 %d2, %d0, %d1; st.global.u32 [%d2], %r3; ret; }"""
    )
    y = memory.empty(4 * 21 * 1024)
    counters = px.Module(text).launch("number", 21, 1024, [y], memory=memory)
    assert (memory.download(y, np.uint32, 21 * 1024) == np.arange(21 * 1024)).all()
    assert counters.warp_instructions["global_store"] == counters.of("global_store").requests == 21 * 32
