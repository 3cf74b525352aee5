"""What the C library's allocator says of itself, and how it is asked to give free pages back (glibc; else nothing).
No torch here.

An engine's steps allocate and free tens of megabytes a time. By itself glibc gives much of that back at once: blocks
above a threshold that moves between 128 KiB and 32 MiB, and the free end of the heap as soon as it is long. Then each
layer of each step faults the same pages in anew, which was a seventh of the time of a long prompt. So an engine that is
ready serves all sizes up to 32 MiB from its heap and keeps the heap's end, until it has had nothing to do for a while:
then it is asked to give everything back.

The HTTP process has no steps. What it allocates much of is tokenizers. Reading one takes several times what it keeps,
in whichever thread that is; and each thread has a heap of its own, whose free end no asking gives back. So there the
thresholds stay as small as they begin.
"""

from __future__ import annotations

import ctypes
import mmap
import re
from collections.abc import Iterable
from typing import Any, Final

_FIELDS: Final = (
    "arena",
    "ordblks",
    "smblks",
    "hblks",
    "hblkhd",
    "usmblks",
    "fsmblks",
    "uordblks",
    "fordblks",
    "keepcost",
)


class _Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in _FIELDS]


def _library() -> Any:
    try:
        library = ctypes.CDLL(None)
        library.mallinfo2.restype = _Mallinfo2
        library.malloc_trim.argtypes = (ctypes.c_size_t,)
        library.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
        library.open_memstream.restype = ctypes.c_void_p
        library.malloc_info.argtypes = (ctypes.c_int, ctypes.c_void_p)
        library.fclose.argtypes = library.free.argtypes = (ctypes.c_void_p,)
    except (OSError, AttributeError):  # another C library, or glibc before 2.33
        return None
    return library


_LIBC: Final = _library()
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_SMALL_END: Final = 128 * 1024
"""glibc's own first value."""
_LARGE_END: Final = 2**31 - 1
_LARGE_BLOCK: Final = 32 * 1024 * 1024
"""The most that each of them can be."""
_MAIN_HEAP: Final = re.compile(rb'<heap nr="0">.*?</heap>', re.DOTALL)
_SIZES: Final = re.compile(rb'<(?:total|system) type="(fast|rest|current)"[^/]* size="(\d+)"/>')


def in_use() -> int | None:
    """Bytes that malloc has handed out and not got back, in its heaps and in mappings of their own."""
    if _LIBC is None:
        return None
    info = _LIBC.mallinfo2()
    return int(info.uordblks + info.hblkhd)


def in_main_heap() -> int:
    """Of those bytes the ones in malloc's first heap, which the system names [heap]; 0 where the library does not tell.

    mallinfo2 adds the heaps of all threads up; only malloc_info tells them apart.
    """
    main = _MAIN_HEAP.search(_malloc_info())
    if main is None:
        return 0
    sizes = {name.decode(): int(size) for name, size in _SIZES.findall(main[0])}
    return sizes["current"] - sizes["fast"] - sizes["rest"]


def _malloc_info() -> bytes:
    """The C library's own account of each heap, in XML; empty where it has none."""
    if _LIBC is None:
        return b""
    text, length = ctypes.c_void_p(), ctypes.c_size_t()
    stream = _LIBC.open_memstream(ctypes.byref(text), ctypes.byref(length))
    if not stream:
        return b""
    try:
        _LIBC.malloc_info(0, stream)
    finally:
        _LIBC.fclose(stream)  # only now are text and length set
    try:
        return ctypes.string_at(text.value or 0, length.value)
    finally:
        _LIBC.free(text)


def give_back() -> None:
    """Lets the system have every whole page that is free; some milliseconds."""
    if _LIBC is not None:
        _LIBC.malloc_trim(0)


def keep_much() -> None:
    """From now on what is freed stays for the next to come, until `give_back`. For the whole process, and once."""
    if _LIBC is not None:
        _LIBC.mallopt(_M_TRIM_THRESHOLD, _LARGE_END)
        _LIBC.mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK)


def keep_little() -> None:
    """From now on the free end of every heap goes back at once. For the whole process, and to be called once."""
    if _LIBC is not None:
        _LIBC.mallopt(_M_TRIM_THRESHOLD, _SMALL_END)


def resident_bytes(ranges: Iterable[tuple[int, int]]) -> int:
    """How much of these ranges of addresses, widened to whole pages, is in memory."""
    if _LIBC is None:
        return 0
    resident = 0
    for first, last in ranges:
        start = first // mmap.PAGESIZE * mmap.PAGESIZE
        pages = -(-(last - start) // mmap.PAGESIZE)
        flags = ctypes.create_string_buffer(pages)
        if _LIBC.mincore(start, last - start, flags) == 0:
            resident += flags.raw[:pages].count(b"\x01") * mmap.PAGESIZE
    return resident
