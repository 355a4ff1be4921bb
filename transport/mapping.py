"""Shared memory that leaves nothing behind: sealed memfds and their mappings.

Memory model: a memfd lives as long as a mapping or descriptor of it does, so nothing stays after `kill -9`. Its size
is sealed when it is made, and checked where it is mapped: a file that shrank under a mapping would end the process
with SIGBUS. Pages are populated at once, outside the interpreter lock (0.3 to 0.6 s per GiB), so that no later write
meets a page fault.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os

from core.errors import TransferError

_MADV_POPULATE_WRITE = 23
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Mapping:
    """A whole memfd, mapped shared. Satisfies `transport.base.Memory`; unmapped when closed or collected."""

    def __init__(self, fd: int, num_bytes: int) -> None:
        try:
            self._mmap = mmap.mmap(fd, num_bytes)
        except (OSError, ValueError) as error:
            raise TransferError(f"cannot map {num_bytes} bytes of shared memory: {error}") from error
        self._anchor: ctypes.c_char | None = ctypes.c_char.from_buffer(self._mmap)
        self.address = ctypes.addressof(self._anchor)
        self.num_bytes = num_bytes

    def populate(self) -> None:
        """Makes every page present and writable. Raises TransferError if there is not enough memory."""
        if _libc.madvise(self.address, self.num_bytes, _MADV_POPULATE_WRITE) == 0:
            return
        code = ctypes.get_errno()
        if code != errno.EINVAL:
            raise TransferError(f"cannot populate {self.num_bytes} bytes of shared memory: {os.strerror(code)}")
        _ = self._mmap[:: mmap.PAGESIZE]  # kernels before 5.14: reading allocates, the first write only maps

    def close(self) -> None:
        """Unmaps: nothing of this process can touch the memory any more."""
        self._anchor = None
        self._mmap.close()


def make_memfd(num_bytes: int) -> int:
    """A sealed memfd of this size. Raises TransferError if the system refuses."""
    try:
        fd = os.memfd_create("baton-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        raise TransferError(f"cannot make shared memory: {error}") from error
    try:
        os.ftruncate(fd, num_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except (OSError, OverflowError) as error:
        os.close(fd)
        raise TransferError(f"cannot make {num_bytes} bytes of shared memory: {error}") from error
    return fd


def map_foreign(fd: int, num_bytes: int) -> Mapping:
    """Maps a memfd that a peer sent. Raises TransferError unless its size is as described and sealed."""
    try:
        is_sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
        size = os.fstat(fd).st_size
    except OSError as error:
        raise TransferError(f"the peer's memory is no memfd: {error}") from error
    if not is_sealed or size != num_bytes:
        raise TransferError(f"the peer's memory has {size} bytes, sealed: {bool(is_sealed)}; described: {num_bytes}")
    return Mapping(fd, num_bytes)
