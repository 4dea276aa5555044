"""Whether a Ray cluster answers somebody who shows no token.

Ray of this process shows its own, and an open cluster lets it in all the same. So this asks what
gRPC would ask, in plain HTTP/2 (RFC 9113) and with nothing but what one question needs.
"""

from __future__ import annotations

import socket
import struct

_TIMEOUT_S = 5.0
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_QUESTION = "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo"
_DATA, _HEADERS, _RESET, _SETTINGS, _GOAWAY = 0, 1, 3, 4, 7  # types of frames
_END_STREAM, _ACK, _END_HEADERS = 1, 1, 4  # flags
_STREAM = 1
_EMPTY_MESSAGE = bytes(5)  # not compressed, of length 0


def admits_strangers(address: str) -> bool | None:
    """Ask a cluster which nodes it has, without a token.

    Parameters
    ----------
    address
        ``host:port`` of the cluster's head.

    Returns
    -------
    bool or None
        True if it tells, False if it answers without telling, None if nobody knows.
    """
    host, _, port = address.rpartition(":")
    headers = {
        ":method": "POST",
        ":scheme": "http",
        ":path": _QUESTION,
        ":authority": address,
        "te": "trailers",  # codespell:ignore te
        "content-type": "application/grpc",
    }
    question = (
        _PREFACE
        + _frame(_SETTINGS, 0, 0, b"")
        + _frame(_HEADERS, _END_HEADERS, _STREAM, b"".join(_field(*one) for one in headers.items()))
        + _frame(_DATA, _END_STREAM, _STREAM, _EMPTY_MESSAGE)
    )
    try:
        with socket.create_connection((host, int(port)), timeout=_TIMEOUT_S) as connection:
            connection.sendall(question)
            return _answer(connection)
    except (OSError, ValueError, EOFError):
        return None


def _answer(connection: socket.socket) -> bool | None:
    while True:
        size, kind, flags, stream = struct.unpack(">IBBI", b"\0" + _read(connection, 9))
        _read(connection, size)
        if kind == _SETTINGS and not flags & _ACK:
            connection.sendall(_frame(_SETTINGS, _ACK, 0, b""))
        if kind == _DATA and stream == _STREAM and size > len(_EMPTY_MESSAGE):
            return True
        if kind == _HEADERS and stream == _STREAM and flags & _END_STREAM:
            return False
        if kind in (_RESET, _GOAWAY):
            return None


def _read(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = connection.recv(size - len(data))
        if not more:
            raise EOFError
        data += more
    return data


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">IBBI", len(payload), kind, flags, stream)[1:] + payload


def _field(name: str, value: str) -> bytes:
    """Return a header as HPACK (RFC 7541) has one that is in no table: not indexed, not coded."""
    return b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
