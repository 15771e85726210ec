"""What processors can execute: the sets a wheel is compiled for, and what this machine has."""

import platform
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class InstructionSet:
    """One that a wheel's libraries are compiled for.

    Args:
        name: for file names.
        flags: what the compiler gets.
        needs: what a processor that can execute it has, in the words of /proc/cpuinfo.
    """

    name: str
    flags: tuple[str, ...] = ()
    needs: frozenset[str] = frozenset()


_VNNI = "-march=x86-64-v4 -mavx512vnni"
_VBMI2 = f"{_VNNI} -mavx512vbmi -mavx512vbmi2 -mavx512bitalg -mavx512vpopcntdq"
_ROWS = (
    ("v2", "-march=x86-64-v2", "cx16 lahf_lm pni popcnt sse4_1 sse4_2 ssse3"),
    ("v3", "-march=x86-64-v3", "abm avx avx2 bmi1 bmi2 f16c fma movbe xsave"),
    ("v4", "-march=x86-64-v4", "avx512bw avx512cd avx512dq avx512f avx512vl"),
    ("v4-vnni", _VNNI, "avx512_vnni"),
    ("v4-vbmi2", _VBMI2, "avx512vbmi avx512_vbmi2 avx512_bitalg avx512_vpopcntdq"),
    ("v4-bf16", f"{_VBMI2} -mavx512bf16", "avx512_bf16"),
)
"""Name, flags, and what a processor needs beside what the rows above need.

There is one wherever kernels change. Skylake servers have v4, Cascade Lake VNNI, Ice Lake VBMI2,
Sapphire Rapids and Zen 4 BF16.
"""


def compiled_for() -> list[InstructionSet]:
    """Those that a wheel for this machine's platform brings libraries for, the best first.

    Where the system does not list what its processor has, it is the one that all processors have.
    """
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return [InstructionSet(platform.machine())]
    found: list[InstructionSet] = []
    needs: frozenset[str] = frozenset()
    for name, flags, more in _ROWS:
        needs |= frozenset(more.split())
        found.insert(0, InstructionSet(name, tuple(flags.split()), needs))
    return found


def best(has: frozenset[str]) -> InstructionSet | None:
    """The best that a wheel brings for a processor with these features; None if it lacks them."""
    return next((found for found in compiled_for() if found.needs <= has), None)


def features() -> frozenset[str]:
    """What this machine's processor has, as Linux lists it; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    line = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return frozenset(line.partition(":")[2].split())
