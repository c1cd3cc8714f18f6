"""Memory that two processes of one machine share, for the arrays of what they send each other.

An object is pickled without its arrays, whose numbers are copied into the memory and out of it: some tens of
microseconds, where Ray's object store takes milliseconds. The memory is anonymous, so that nothing is left of it when
its owner ends, however that happens; others reach it by the owner's open file. That takes Linux: elsewhere arrays
travel with the rest.
"""

from __future__ import annotations

import os
import pickle
from mmap import mmap
from typing import Any, NamedTuple

_ALIGNED = 64
_SMALLEST = 2**20


class Packed(NamedTuple):
    """An object on its way.

    Attributes:
        head: Its pickle, without what lies in the memory.
        sizes: Bytes of each array there, in order.
    """

    head: bytes
    sizes: tuple[int, ...]


class Memory:
    """One piece of memory; what is packed there stays until the next `pack` of either side.

    Args:
        path: Of another process's memory; None: a new one.

    Attributes:
        path: Where other processes find it while its owner lives.

    Raises:
        OSError: There is none to be had.
    """

    def __init__(self, path: str | None = None) -> None:
        self._file = os.memfd_create("fedmm") if path is None else os.open(path, os.O_RDWR)
        self.path = path or f"/proc/{os.getpid()}/fd/{self._file}"
        self._map: mmap | None = None

    def pack(self, value: Any) -> Packed:
        """Put an object's arrays here."""
        buffers: list[pickle.PickleBuffer] = []
        head = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
        found = [buffer.raw() for buffer in buffers]
        sizes = tuple(view.nbytes for view in found)
        there = self._views(sizes)
        for view, place in zip(found, there, strict=True):
            place[:] = view
        return Packed(head, sizes)

    def unpack(self, packed: Packed, *, copy: bool) -> Any:
        """The object again; its arrays are copies, or read-only and good until the next `pack`."""
        there = self._views(packed.sizes)
        return pickle.loads(packed.head, buffers=[bytearray(v) if copy else v.toreadonly() for v in there])

    def close(self) -> None:
        """Give it up."""
        self._map = None
        os.close(self._file)

    def _views(self, sizes: tuple[int, ...]) -> list[memoryview]:
        """The places of arrays of these sizes, one after another."""
        if not sizes:
            return []
        starts, end = [], 0
        for size in sizes:
            starts.append(end)
            end += -(-size // _ALIGNED) * _ALIGNED
        if self._map is None or len(self._map) < end:
            there = os.fstat(self._file).st_size
            if there < end:
                there = max(_SMALLEST, 1 << (end - 1).bit_length())
                os.ftruncate(self._file, there)
            self._map = mmap(self._file, there)
        whole = memoryview(self._map)
        return [whole[start : start + size] for start, size in zip(starts, sizes, strict=True)]


def new_memory() -> Memory | None:
    """A new piece of memory, or None on a system that has none to share."""
    try:
        return Memory()
    except (AttributeError, OSError):
        return None


def pack(value: Any, memory: Memory | None) -> Packed:
    """An object with its arrays in a piece of memory, or, if there is none, with all of it in the head."""
    return Packed(pickle.dumps(value, protocol=5), ()) if memory is None else memory.pack(value)


def unpack(packed: Packed, memory: Memory | None, *, copy: bool = False) -> Any:
    """What was packed (see `Memory.unpack`)."""
    return pickle.loads(packed.head) if memory is None else memory.unpack(packed, copy=copy)
