"""The memory of a step on a host without accelerator: kept between steps, in large pages, clear of what compiling left.

All of it is about glibc's malloc, and nothing is done without it. docs/speed.md says what each part brings.
"""

import ctypes
import gc
import importlib.metadata
import importlib.util
import os
import resource

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # of glibc's malloc.h
MADV_HUGEPAGE = 14  # of Linux's mman.h
LARGE_PAGE = 2 << 20  # bytes
MOST_HOLE, LEAST_HOLE = 1 << 30, 1 << 10  # bytes; smaller free pieces have lists of one size each, not searched


def keep_freed_memory() -> None:
    """What XLA frees on the host stays with the process, for the next step.

    Called before the process starts any thread: the first one that allocates gets a heap of its own, and no option of
    malloc takes it away. glibc hands large buffers of such heaps back to the kernel, which zeroes them page by page
    when the next step asks for as much. Nothing is done where an accelerator could do the work, whose host rather needs
    its heaps.
    """
    if libc := _glibc():
        for option, value in {M_TRIM_THRESHOLD: -1, M_MMAP_MAX: 0, M_ARENA_MAX: 1}.items():
            libc.mallopt(option, value)
        _ask_for_large_pages(libc)


def leave_fragments() -> None:
    """Later buffers come from one whole piece of the heap; called after programs were compiled and before they run.

    Compiling leaves some hundred thousand free pieces between what it keeps. malloc searches them for each buffer of a
    step, and the devices wait for each other meanwhile. Their pages go back to the kernel and their addresses are never
    used again. Nothing is done in a process that did not begin with `keep_freed_memory`.
    """
    if libc := _glibc():
        gc.collect()
        libc.malloc_trim(0)
        whole, size = _ask_for_large_pages(libc), MOST_HOLE
        left = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10  # what is free now was once used
        while whole and size >= LEAST_HOLE:
            while (piece := libc.malloc(size)) and piece < whole and left > 0:
                left -= size  # the piece is never freed
            libc.free(piece)
            size //= 2


def _ask_for_large_pages(libc: ctypes.CDLL) -> int:
    """Lets the kernel use large pages at the end of the heap, for half of the memory; its address, or 0 if there is no
    such end: the kernel refused, or malloc maps large buffers one by one."""
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    start = libc.malloc(size) or 0  # addresses only: no page exists before it is written
    in_heap = 0 < start and start + size <= libc.sbrk(0)
    if in_heap:
        first = -(-start // LARGE_PAGE) * LARGE_PAGE
        libc.madvise(first, start + size - first, MADV_HUGEPAGE)  # kernels without them refuse, which is no harm
    libc.free(start)
    return start if in_heap else 0


def _glibc() -> ctypes.CDLL | None:
    accelerators = importlib.util.find_spec("libtpu") or importlib.metadata.entry_points(group="jax_plugins")
    if (accelerators and os.environ.get("JAX_PLATFORMS") != "cpu") or os.name != "posix":
        return None
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return None
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
    libc.sbrk.restype, libc.sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc
