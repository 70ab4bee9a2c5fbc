"""Which CPU this is. Virtual machines give the processors of several generations one name ("AMD EPYC"), so a name isn't enough.

Linux tells the rest in /proc/cpuinfo and /sys; elsewhere only the name is known.
"""

from __future__ import annotations

import functools
import os
import platform
from dataclasses import dataclass
from pathlib import Path

# Instructions that convolutions may use, as Linux names them: x86-64, then Arm.
_INSTRUCTION_SETS = (
    *("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16"),
    *("avx512_fp16", "amx_tile", "amx_int8", "amx_bf16", "amx_fp16", "avx10"),
    *("asimd", "asimdhp", "asimddp", "asimdfhm", "bf16", "i8mm", "sve", "sve2", "svebf16", "sme"),
)

# Those that multiply numbers of less than 32 bits.
_MULTIPLIES = {
    "bfloat16": {"avx512_bf16", "amx_bf16", "bf16", "svebf16"},
    "float16": {"avx512_fp16", "amx_fp16", "asimdhp"},
}

# By family: ranges of models with the name of their microarchitecture. Source: Linux, arch/x86/kernel/cpu/amd.c.
_AMD = {
    0x17: (
        *((0x00, 0x2F, "Zen"), (0x30, 0x4F, "Zen 2"), (0x50, 0x5F, "Zen"), (0x60, 0x7F, "Zen 2")),
        *((0x90, 0x91, "Zen 2"), (0xA0, 0xAF, "Zen 2")),
    ),
    0x18: ((0x00, 0xFF, "Zen"),),  # Hygon
    0x19: ((0x00, 0x0F, "Zen 3"), (0x10, 0x1F, "Zen 4"), (0x20, 0x5F, "Zen 3"), (0x60, 0xAF, "Zen 4")),
    0x1A: ((0x00, 0x2F, "Zen 5"), (0x40, 0x4F, "Zen 5"), (0x60, 0x7F, "Zen 5")),
}
# Models of family 6. Source: Linux, arch/x86/include/asm/intel-family.h.
_INTEL = {
    **dict.fromkeys((0x3C, 0x3F, 0x45, 0x46), "Haswell"),
    **dict.fromkeys((0x3D, 0x47, 0x4F, 0x56), "Broadwell"),
    **dict.fromkeys((0x4E, 0x55, 0x5E), "Skylake"),
    **dict.fromkeys((0x8E, 0x9E), "Kaby Lake"),
    **dict.fromkeys((0xA5, 0xA6), "Comet Lake"),
    **dict.fromkeys((0x6A, 0x6C, 0x7D, 0x7E), "Ice Lake"),
    **dict.fromkeys((0x8C, 0x8D), "Tiger Lake"),
    0xA7: "Rocket Lake",
    0x8F: "Sapphire Rapids",
    0xCF: "Emerald Rapids",
    **dict.fromkeys((0xAD, 0xAE), "Granite Rapids"),
    0xAF: "Sierra Forest",
    **dict.fromkeys((0x97, 0x9A, 0xBE), "Alder Lake"),
    **dict.fromkeys((0xB7, 0xBA, 0xBF), "Raptor Lake"),
    **dict.fromkeys((0xAA, 0xAC), "Meteor Lake"),
    **dict.fromkeys((0xB5, 0xC5, 0xC6), "Arrow Lake"),
    0xBD: "Lunar Lake",
}
# Parts of Arm's own. Source: Linux, arch/arm64/include/asm/cputype.h.
_ARM = {
    0xD0C: "Neoverse N1",
    0xD40: "Neoverse V1",
    0xD49: "Neoverse N2",
    0xD4F: "Neoverse V2",
    0xD84: "Neoverse V3",
    0xD8E: "Neoverse N3",
}


@dataclass(frozen=True)
class Processor:
    """A CPU, as Linux describes its first core.

    Attributes:
        name: as its maker, or the virtual machine, gives it.
        vendor: "AuthenticAMD", "GenuineIntel", on Arm the implementer's number; "" where it isn't known, as all that follows.
        family, model, stepping: the maker's numbers; on Arm architecture, part, and variant with revision.
        instruction_sets: those that convolutions may use.
        cores: of all sockets, without the second threads of a core.
        threads: that run at once on all of them.
        caches: sizes of the first core's, such as "L1d 48K, L2 1024K, L3 32768K".
    """

    name: str
    vendor: str = ""
    family: int | None = None
    model: int | None = None
    stepping: str = ""
    instruction_sets: tuple[str, ...] = ()
    cores: int = 0
    threads: int = 0
    caches: str = ""

    @property
    def microarchitecture(self) -> str:
        """Its generation, such as "Zen 5"; "" where it isn't in the tables."""
        if self.family is None or self.model is None:
            return ""
        if self.vendor in ("AuthenticAMD", "HygonGenuine"):
            ranges = _AMD.get(self.family, ())
            return next((name for first, last, name in ranges if first <= self.model <= last), "")
        if self.vendor == "0x41":
            return _ARM.get(self.model, "")
        if self.vendor != "GenuineIntel" or self.family != 6:
            return ""
        if self.model == 0x55 and self.stepping.isdigit() and int(self.stepping) >= 5:
            return "Cascade Lake" if int(self.stepping) < 10 else "Cooper Lake"
        return _INTEL.get(self.model, "")

    def multiplies(self, dtype: str) -> bool:
        """Whether it has instructions that multiply numbers of this dtype; True where its instruction sets aren't known."""
        wanted = _MULTIPLIES.get(dtype)
        return wanted is None or not self.vendor or not wanted.isdisjoint(self.instruction_sets)

    @property
    def signature(self) -> str:
        """Vendor, family, model and stepping in a line; "" where they aren't known."""
        if not self.vendor:
            return ""
        return f"{self.vendor} family {self.family} model {self.model} stepping {self.stepping}"

    def __str__(self) -> str:
        """The name and what tells it from others of that name, such as "AMD EPYC (Zen 5)"."""
        known = self.microarchitecture or self.signature
        return f"{self.name} ({known})" if known else self.name

    def to_json(self) -> dict[str, str]:
        """All of it, in texts, for files."""
        return {
            "cpu": self.name,
            "microarchitecture": self.microarchitecture,
            "signature": self.signature,
            "instruction_sets": " ".join(self.instruction_sets),
            "cores": str(self.cores),
            "caches": self.caches,
        }


@functools.cache
def processor() -> Processor:
    """This machine's."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    return parse(text, caches(Path("/sys/devices/system/cpu/cpu0/cache")))


def parse(cpuinfo: str, cache_sizes: str = "") -> Processor:
    """The processor that /proc/cpuinfo tells of; where that is empty, its name and the number of its threads."""
    cores = [fields for fields in map(_fields, cpuinfo.split("\n\n")) if "processor" in fields]
    first = cores[0] if cores else {}
    name = first.get("model name") or platform.processor() or platform.machine()
    if not cores:
        return Processor(name, cores=os.cpu_count() or 1, threads=os.cpu_count() or 1, caches=cache_sizes)
    flags = first.get("flags", first.get("Features", "")).split()
    places = {(core.get("physical id", ""), core.get("core id", core["processor"])) for core in cores}
    if "CPU implementer" in first:
        signature = (first["CPU implementer"], _number(first.get("CPU architecture")), _number(first.get("CPU part")))
        stepping = f"{first.get('CPU variant', '')} {first.get('CPU revision', '')}".strip()
    else:
        signature = (first.get("vendor_id", ""), _number(first.get("cpu family")), _number(first.get("model")))
        stepping = first.get("stepping", "")
    own = tuple(name for name in _INSTRUCTION_SETS if name in flags)
    return Processor(name, *signature, stepping, own, len(places), len(cores), cache_sizes)


def caches(folder: Path) -> str:
    """The sizes in a core's folder of caches, without that of instructions; "" where there is none."""
    found = []
    for index in sorted(folder.glob("index*")):
        try:
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        if kind != "Instruction":
            found.append(f"L{level}{'d' if kind == 'Data' else ''} {size}")
    return ", ".join(found)


def _fields(block: str) -> dict[str, str]:
    pairs = (line.partition(":") for line in block.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _number(text: str | None) -> int | None:
    try:
        return int(text or "", 0)
    except ValueError:
        return None
