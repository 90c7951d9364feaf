"""Frames on a stream socket: a 4-byte little-endian length, then a message."""

import asyncio
import socket
import struct

_LENGTH = struct.Struct("<I")


def frame(message: bytes) -> bytes:
    """A message ready to be written."""
    return _LENGTH.pack(len(message)) + message


def read_frame(connection: socket.socket) -> bytes | None:
    """The next message, or None when either side is gone."""
    header = _read_exactly(connection, _LENGTH.size)
    return None if header is None else _read_exactly(connection, _LENGTH.unpack(header)[0])


async def read_frame_async(reader: asyncio.StreamReader) -> bytes | None:
    """The same from an asyncio stream."""
    try:
        header = await reader.readexactly(_LENGTH.size)
        return await reader.readexactly(_LENGTH.unpack(header)[0])
    except (asyncio.IncompleteReadError, ConnectionError):
        return None


def _read_exactly(connection: socket.socket, size: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < size:
        try:
            part = connection.recv(size - len(parts))
        except OSError:  # that of a socket which this side has closed meanwhile, too
            return None
        if not part:
            return None
        parts += part
    return bytes(parts)
