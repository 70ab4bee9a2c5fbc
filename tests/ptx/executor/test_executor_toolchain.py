"""The toolchain: where it is found, what it says of a kernel, and what it says when it is missing."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import ptx_executor as px
import pytest
from ptx_executor import sass, toolchain

KERNELS = Path(__file__).parent / "kernels"


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No CUDA_HOME, no PyPI packages, an empty PATH."""
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    monkeypatch.setattr(toolchain, "package_folders", lambda *where: [])
    return tmp_path


def fake_toolkit(root: Path) -> Path:
    (root / "bin").mkdir(parents=True)
    for tool in ("nvcc", "ptxas"):
        (root / "bin" / tool).touch()
    return root


@pytest.mark.usefixtures("nothing_installed")
def test_missing_toolkit_names_the_remedy() -> None:
    with pytest.raises(px.ToolkitNotFound, match=r'pip install "cuda-toolkit\[nvcc,nvvm,crt,cccl\]==13.0') as missing:
        px.find_toolkit()
    assert "CUDA_HOME (not set)" in str(missing.value)
    with pytest.raises(px.ToolkitNotFound, match="nvdisasm is not installed"):
        toolchain.find_tool("nvdisasm")


def test_cuda_home_wins_and_must_be_a_toolkit(monkeypatch: pytest.MonkeyPatch, nothing_installed: Path) -> None:
    packaged, chosen = fake_toolkit(nothing_installed / "packaged"), fake_toolkit(nothing_installed / "chosen")
    monkeypatch.setattr(toolchain, "package_folders", lambda *where: [packaged])
    assert px.find_toolkit().root == packaged
    monkeypatch.setenv("CUDA_HOME", str(chosen))
    assert px.find_toolkit() == px.Toolkit(chosen, chosen / "bin" / "nvcc", chosen / "bin" / "ptxas")
    assert px.find_toolkit().include == chosen / "include"
    monkeypatch.setenv("CUDA_HOME", str(nothing_installed / "elsewhere"))
    with pytest.raises(px.ToolkitNotFound, match="has no bin/nvcc and bin/ptxas"):
        px.find_toolkit()


def test_nvcc_on_path_is_asked_where_it_lives(monkeypatch: pytest.MonkeyPatch, nothing_installed: Path) -> None:
    home = fake_toolkit(nothing_installed / "home")
    script = nothing_installed / "nvcc"
    script.write_text(f'#!/bin/sh\necho "#$ TOP={home}/bin/.." >&2\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{nothing_installed}{os.pathsep}/bin{os.pathsep}/usr/bin")
    assert px.find_toolkit().root == home


def test_compile_error_shows_what_nvcc_printed(cuda: Callable[..., px.Module]) -> None:
    with pytest.raises(px.CompileError, match='identifier "undeclared" is undefined'):
        px.compile_ptx("__global__ void k(int* x) {\n *x = undeclared; }\n")


def test_resources_of_kernels(cuda: Callable[..., px.Module]) -> None:
    info = px.ptxas_info(cuda("layouts.cu").ptx, "sm_80")
    assert set(info) == set(cuda("layouts.cu").kernels)
    assert info["transpose_plain"].shared_bytes == 32 * 33 * 4
    assert info["ldmatrix_padded"].shared_bytes == 32 * 9 * 16
    assert info["transpose_plain"].barriers == 1
    assert info["copy4"].registers > 0
    assert info["copy4"].spill_stores == info["copy4"].spill_loads == info["copy4"].stack == 0


def test_spills_are_reported(cuda: Callable[..., px.Module]) -> None:
    source = """extern "C" __global__ void __launch_bounds__(1024, 2) spill(float* x) {
        float v[64];
        for (int k = 0; k < 64; k++) v[k] = x[k * 1024 + threadIdx.x];
        __syncthreads();
        for (int k = 0; k < 64; k++) x[k * 1024 + threadIdx.x] = v[63 - k] * v[(k * 7) & 63];
    }\n"""
    info = px.ptxas_info(px.compile_ptx(source), "sm_80")["spill"]
    assert info.registers <= 32
    assert info.spill_stores > 0
    assert info.spill_loads > 0


def test_instruction_mix_of_the_hottest_loop(cuda: Callable[..., px.Module]) -> None:
    try:
        toolchain.find_tool("nvdisasm")
    except px.ToolkitNotFound as missing:
        pytest.skip(str(missing))
    mix = px.sass_mix(cuda("tensor.cu").ptx, "sm_80")["wmma_float16"]
    assert mix.loop_range is not None
    assert mix.count("HMMA.16816.F32") > 0
    assert mix.count("HMMA") <= mix.count("HMMA", loop=False)
    assert mix.count("STG") == 0  # the sum is stored after the loop
    assert mix.count("STG", loop=False) > 0


def test_innermost_loop_with_tensor_instructions_is_the_hottest() -> None:
    listing = """
.L_x_0:
        /*0000*/                   MOV R1, R2 ;
.L_x_1:
        /*0010*/                   FFMA R1, R2, R3, R4 ;
        /*0020*/                   FFMA R1, R2, R3, R4 ;
        /*0030*/              @P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0040*/                   HMMA.16816.F32 R4, R8, R2, R4 ;
        /*0050*/             @!P1 BRA `(.L_x_2) ;
        /*0060*/              @P2 BRA `(.L_x_0) ;
        /*0070*/                   EXIT ;
.L_x_3:
        /*0080*/                   BRA `(.L_x_3) ;
        /*0090*/                   NOP ;
"""
    mix = sass.mix_of(listing)
    assert mix.loop == {"HMMA.16816.F32": 1, "BRA": 1}
    assert mix.loop_range == (0x40, 0x50)
    assert mix.kernel == {"MOV": 1, "FFMA": 2, "BRA": 3, "HMMA.16816.F32": 1, "EXIT": 1}
