"""
Spreads the connections evenly over the sockets of an address.

The kernel picks one of the sockets with SO_REUSEPORT by a hash of the peer's address
and port.  That is random: of 400 connections to 4 workers, the busiest worker often
gets 1.25 times as many as the least busy one.  Instead, an eBPF program in the kernel
(SO_ATTACH_REUSEPORT_EBPF in socket(7)) picks the sockets round-robin, and leaves out
those without a worker of their own.  Loading it takes root or CAP_BPF.  Without these
privileges the hash remains.

A classic BPF program (SO_ATTACH_REUSEPORT_CBPF) needs no privileges, but sees only the
packet and cannot count.  Since Linux 5.18 the ports of a client's connections rise by
random steps, so that picking by the port is hardly better than the hash; and a client
could choose its worker.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import socket
import struct
import sys
from collections.abc import Sequence
from typing import Final

# The number of the system call bpf(2) by machine.  They are all little-endian, as the
# registers in the second byte of _instruction() change places on others.
_BPF: Final = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "ppc64le": 361}

_SO_ATTACH_REUSEPORT_EBPF: Final = 52
_MAP_CREATE: Final = 0
_PROG_LOAD: Final = 5
_ARRAY: Final = 2
_MMAPABLE: Final = 1 << 10
_SOCKET_FILTER: Final = 1

# The entries of the array, 8 bytes each: how many connections there were, how many
# sockets are in the rotation, and the indices of these sockets.
_COUNT, _SOCKETS, _FIRST = range(3)
_ENTRIES: Final = 512

# The code of "jump if the register is 0".  _load fills in the distance to the end.
_TO_THE_END: Final = 0x15


class RoundRobin:
    """
    Distributes connections round-robin over the sockets of one SO_REUSEPORT group.

    :param member: a listening socket of the group.
    :raises OSError: if the system does not support it, or the process lacks the
        privileges.
    """

    def __init__(self, member: socket.socket) -> None:
        array = _bpf(_MAP_CREATE, struct.pack("=5I", _ARRAY, 4, 8, _ENTRIES, _MMAPABLE))
        try:
            program = _load(array)
            try:
                member.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_REUSEPORT_EBPF, program)
            finally:
                os.close(program)
            self._array = mmap.mmap(array, _ENTRIES * 8)
        finally:
            os.close(array)

    def choose(self, indices: Sequence[int]) -> None:
        """
        Choose the sockets that get connections.

        :param indices: their positions in the order in which the sockets started to
            listen.  If there are none, the kernel's hash decides.
        """
        for number, index in enumerate(indices, _FIRST):
            self._set(number, index)
        self._set(_SOCKETS, len(indices))

    def close(self) -> None:
        """Release the array.  The kernel drops the program with the last socket."""
        self._array.close()

    def _set(self, entry: int, number: int) -> None:
        struct.pack_into("=Q", self._array, entry * 8, number)


def _load(array: int) -> int:
    """
    Load the program into the kernel.

    :param array: the descriptor of the array.
    :return: the descriptor of the program.
    """
    lookup = [
        # The key is at the top of the stack.
        _instruction(0xBF, 2, 10),  # r2 = r10
        _instruction(0x07, 2, imm=-4),  # r2 += -4
        _instruction(0x18, 1, 1, imm=array),  # r1 = the array
        _instruction(0),
        _instruction(0x85, imm=1),  # r0 = bpf_map_lookup_elem(r1, r2)
        _instruction(_TO_THE_END, 0),  # if r0 == 0: by hash
    ]
    program = [
        _instruction(0x62, 10, off=-4, imm=_COUNT),  # key = _COUNT
        *lookup,
        _instruction(0xB7, 6, imm=1),  # r6 = 1
        _instruction(0xDB, 0, 6, imm=1),  # r6 = fetch_and_add(r0, r6)
        _instruction(0x62, 10, off=-4, imm=_SOCKETS),  # key = _SOCKETS
        *lookup,
        _instruction(0x79, 7, 0),  # r7 = *r0
        _instruction(_TO_THE_END, 7),  # if r7 == 0: by hash
        _instruction(0x9F, 6, 7),  # r6 %= r7
        _instruction(0x07, 6, imm=_FIRST),  # r6 += _FIRST
        _instruction(0x63, 10, 6, off=-4),  # key = r6
        *lookup,
        _instruction(0x79, 0, 0),  # r0 = *r0
        _instruction(0x95),  # return r0
    ]
    # Jumps are relative to the next instruction.
    program = [
        _instruction(_TO_THE_END, each[1], off=len(program) - position - 1)
        if each[0] == _TO_THE_END
        else each
        for position, each in enumerate(program)
    ]
    program += [
        _instruction(0xB7, 0, imm=-1),  # r0 = -1: no socket has that index, so by hash
        _instruction(0x95),  # return r0
    ]
    code = ctypes.create_string_buffer(b"".join(program))
    licence = ctypes.create_string_buffer(b"GPL")
    return _bpf(
        _PROG_LOAD,
        struct.pack(
            "=2I2Q2IQ2I",
            *(_SOCKET_FILTER, len(program)),
            *(ctypes.addressof(code), ctypes.addressof(licence)),
            *(0, 0, 0, 0, 0),
        ),
    )


def _instruction(
    code: int, dst: int = 0, src: int = 0, off: int = 0, imm: int = 0
) -> bytes:
    return struct.pack("=BBhi", code, src << 4 | dst, off, imm)


def _bpf(command: int, attributes: bytes) -> int:
    number = _BPF.get(platform.machine())
    if number is None or not sys.platform.startswith("linux") or sys.maxsize < 2**32:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    libc = ctypes.CDLL(None, use_errno=True)
    # The kernel accepts a longer structure than it knows if the rest is zero.
    buffer = ctypes.create_string_buffer(attributes, 128)
    descriptor: int = libc.syscall(number, command, buffer, 128)
    if descriptor < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    os.set_inheritable(descriptor, False)
    return descriptor


__all__ = ["RoundRobin"]
