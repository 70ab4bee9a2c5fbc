"""Which CPU it is: processors that a virtual machine gives one name are told apart."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from resnet_fused.backends.processor import Processor, caches, parse, processor

AVX2 = "fpu sse2 fma avx f16c avx2"
AVX512 = f"{AVX2} avx512f avx512dq avx512bw avx512vl avx512_bf16 avx512_vnni"


def x86(vendor: str, family: int, model: int, stepping: int, name: str = "AMD EPYC", flags: str = AVX2, cores: int = 1) -> str:
    """/proc/cpuinfo of so many cores with two threads each."""
    return "\n".join(
        f"processor\t: {i}\nvendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t\t: {model}\nmodel name\t: {name}\n"
        f"stepping\t: {stepping}\nphysical id\t: 0\ncore id\t\t: {i // 2}\nflags\t\t: {flags}\n"
        for i in range(2 * cores)
    )


ARM = (
    "processor\t: 0\nBogoMIPS\t: 2000\nFeatures\t: fp asimd asimddp sve bf16 i8mm\nCPU implementer\t: 0x41\n"
    "CPU architecture: 8\nCPU variant\t: 0x1\nCPU part\t: 0xd40\nCPU revision\t: 1\n"
)

GENERATIONS = {
    "Zen": ("AuthenticAMD", 0x17, 0x01, 2),
    "Zen 2": ("AuthenticAMD", 0x17, 0x31, 0),
    "Zen 3": ("AuthenticAMD", 0x19, 0x01, 1),
    "Zen 4": ("AuthenticAMD", 0x19, 0x11, 1),
    "Zen 5": ("AuthenticAMD", 0x1A, 0x02, 1),
    "Haswell": ("GenuineIntel", 6, 0x3F, 2),
    "Skylake": ("GenuineIntel", 6, 0x55, 4),
    "Cascade Lake": ("GenuineIntel", 6, 0x55, 7),
    "Cooper Lake": ("GenuineIntel", 6, 0x55, 11),
    "Ice Lake": ("GenuineIntel", 6, 0x6A, 6),
    "Sapphire Rapids": ("GenuineIntel", 6, 0x8F, 8),
}


@pytest.mark.parametrize("name", GENERATIONS)
def test_a_generation_is_known_by_its_numbers(name):
    vendor, family, model, stepping = GENERATIONS[name]
    found = parse(x86(vendor, family, model, stepping))
    assert (found.microarchitecture, str(found)) == (name, f"AMD EPYC ({name})")
    assert found.signature == f"{vendor} family {family} model {model} stepping {stepping}"


def test_an_unknown_generation_has_its_numbers():
    found = parse(x86("AuthenticAMD", 0x1A, 0x55, 0))
    assert found.microarchitecture == ""
    assert str(found) == "AMD EPYC (AuthenticAMD family 26 model 85 stepping 0)"
    assert parse(x86("GenuineIntel", 15, 107, 1, "QEMU Virtual CPU")).microarchitecture == ""


def test_all_that_times_depend_on_is_read():
    found = parse(x86("AuthenticAMD", 0x1A, 0x02, 1, flags=AVX512, cores=4), "L1d 48K, L2 1024K")
    known = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16")
    assert found == Processor("AMD EPYC", "AuthenticAMD", 26, 2, "1", known, 4, 8, "L1d 48K, L2 1024K")
    assert found.to_json() == {
        "cpu": "AMD EPYC",
        "microarchitecture": "Zen 5",
        "signature": "AuthenticAMD family 26 model 2 stepping 1",
        "instruction_sets": " ".join(known),
        "cores": "4",
        "caches": "L1d 48K, L2 1024K",
    }


def test_arm():
    found = parse(ARM)
    assert (found.microarchitecture, found.stepping, found.cores) == ("Neoverse V1", "0x1 1", 1)
    assert found.signature == "0x41 family 8 model 3392 stepping 0x1 1"
    assert found.instruction_sets == ("asimd", "asimddp", "bf16", "i8mm", "sve")


def test_without_cpuinfo_there_is_a_name():
    found = parse("")
    assert found.name == (platform.processor() or platform.machine()) == str(found)
    assert (found.signature, found.microarchitecture) == ("", "")
    assert found.cores >= 1


def test_sizes_of_caches(tmp_path):
    for i, (level, kind, size) in enumerate((("1", "Data", "48K"), ("1", "Instruction", "32K"), ("2", "Unified", "1024K"))):
        (tmp_path / f"index{i}").mkdir()
        for name, text in (("level", level), ("type", kind), ("size", size)):
            (tmp_path / f"index{i}" / name).write_text(f"{text}\n")
    (tmp_path / "index3").mkdir()  # which tells nothing
    assert caches(tmp_path) == "L1d 48K, L2 1024K"
    assert caches(tmp_path / "none") == ""


@pytest.mark.skipif(platform.system() != "Linux", reason="Linux alone tells more than the name")
def test_this_machine():
    text = Path("/proc/cpuinfo").read_text()
    found = processor()
    assert found.threads == text.count("\nprocessor") + text.startswith("processor")
    assert 1 <= found.cores <= found.threads
    assert found.signature
