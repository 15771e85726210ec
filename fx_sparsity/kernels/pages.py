"""Memory in large pages, for tables that are read at random places."""

import ctypes
import mmap
import sys

from torch import Tensor

_LEAST = 2 << 20
"""Bytes of a large page on most machines; tensors have to hold more than that."""

_COLLAPSE = 25
"""`MADV_COLLAPSE` of Linux 6.1, to which Python gives no name: at once, instead of in time."""


def use_large_pages(*tensors: Tensor | None) -> None:
    """Ask Linux to hold the memory of CPU tensors in large pages.

    Where each read is of another page, most of its time is taken by finding that page; there are
    512 times fewer large ones. What the tensors hold stays as it is, and where the system does not
    follow the advice, everything does.
    """
    for tensor in tensors:
        # Of the class itself: others, such as fake tensors, may have no memory.
        if type(tensor) is Tensor and tensor.device.type == "cpu" and tensor.nbytes > _LEAST:
            start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
            stop = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
            _advise(start, stop - start)


def _advise(start: int, size: int) -> None:
    if sys.platform != "linux":
        return
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for advice in (mmap.MADV_HUGEPAGE, _COLLAPSE):
        advise(start, size, advice)
