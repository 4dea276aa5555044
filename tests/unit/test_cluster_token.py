"""The token of an embedded cluster, where its place is a problem."""

from __future__ import annotations

from pathlib import Path

import pytest

from peaknet_predict.queues import ClusterError
from peaknet_predict.queues.cluster import connect, ensure_private_token, token_path


def test_a_home_that_cannot_be_written_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.setenv("HOME", "/dev/null")
    with pytest.raises(ClusterError, match="/dev/null/.ray/auth_token .*RAY_AUTH_TOKEN_PATH"):
        connect("local")


def test_an_account_without_a_home_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.setattr(Path, "home", unknown)
    with pytest.raises(ClusterError, match="this account has none"):
        token_path()


def test_a_named_file_needs_no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/dev/null")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "deep" / "token"))
    assert ensure_private_token() == tmp_path / "deep" / "token"
    assert len((tmp_path / "deep" / "token").read_text()) == 64
