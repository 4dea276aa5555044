"""Where the ranks of a run meet."""

from __future__ import annotations

import socket

import pytest

from peaknet_predict.process import supervise


def test_on_several_machines_the_store_listens_at_the_address_named() -> None:
    assert supervise.Layout(2, 2, 0, "somewhere", 1).meets_at == "127.0.0.1"
    assert supervise.Layout(2, 4, 0, "somewhere", 1).meets_at == "somewhere"
    with supervise._listen("127.0.0.1", 0) as bound:
        assert bound.family == socket.AF_INET
        assert bound.getsockname()[0] == "127.0.0.1"
        with pytest.raises(OSError, match="set MASTER_ADDR to an address of the first machine"):
            supervise._listen("127.0.0.1", bound.getsockname()[1])
