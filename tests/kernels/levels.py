"""The levels of `cpu.h` that this machine has; the tests' conftest has all of them compiled in."""

from fx_sparsity._native.cache import instruction_set

_NEEDS = {
    "avx512": ("avx512_vbmi2", "avx512_vnni"),
    "avx512_vnni": ("avx512_vnni",),
    "avx2": ("avx2",),
    "portable": (),
}
LEVELS = [name for name, flags in _NEEDS.items() if {*flags} <= {*instruction_set().split()}]
