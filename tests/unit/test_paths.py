"""Paths as users write them: home directories and variables are put in, everywhere, or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file
from torch import nn

from peaknet_predict.callbacks.cxi_output import CxiOutput
from peaknet_predict.callbacks.queue_writer import QueueWriter
from peaknet_predict.callbacks.weights_export import WeightsExport
from peaknet_predict.cxi.writer import CxiWriter
from peaknet_predict.doctor import doctor
from peaknet_predict.feed import feed
from peaknet_predict.lightning_cli import FitCLI
from peaknet_predict.models import load_weights
from peaknet_predict.process.balance import write_balance
from peaknet_predict.process.files import expanded
from peaknet_predict.queues import QueueAddress
from peaknet_predict.queues.quarantine import Quarantine, read_index
from peaknet_predict.queues.spool import Spool
from peaknet_predict.sources import NpzSource, Simulator
from peaknet_predict.training.export import export_weights
from peaknet_predict.types import EventId
from tests.helpers.paths import CONFIGS


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home directory, which the variable PLACE names too; the working directory is another."""
    directory, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    directory.mkdir()
    elsewhere.mkdir()
    monkeypatch.setenv("HOME", str(directory))
    monkeypatch.setenv("PLACE", str(directory))
    monkeypatch.delenv("NOWHERE", raising=False)
    monkeypatch.chdir(elsewhere)
    return directory


@pytest.mark.parametrize("start", ["~", "$HOME", "${HOME}", "$PLACE", "${PLACE}"])
def test_a_path_is_what_a_shell_makes_of_it(home: Path, start: str) -> None:
    assert expanded(f"{start}/a b/c") == home / "a b" / "c"
    assert expanded(Path(start)) == home


def test_other_paths_stay_as_they_are(home: Path) -> None:
    for path in ("a/b", "/a/b", "a~", "./~x", "50$", "a*[0-9]?.h5"):
        assert expanded(path) == Path(path)


@pytest.mark.parametrize("path", ["$NOWHERE/x", "/data/${NOWHERE}", "~no-such-user/x"])
def test_what_cannot_be_put_in_is_refused_by_name(home: Path, path: str) -> None:
    with pytest.raises(ValueError, match=r"\$NOWHERE|\$\{NOWHERE\}|~no-such-user"):
        expanded(path)


def save_npz(path: str) -> None:
    np.savez(expanded(path).with_suffix(".npz"), data=np.ones((1, 4, 5)), photon_energy=9500.0)
    NpzSource(f"{path}.npz")


def load(path: str) -> None:
    save_file({"weight": nn.Linear(1, 1, bias=False).weight}, expanded(f"{path}.safetensors"))
    load_weights(nn.Linear(1, 1, bias=False), f"{path}.safetensors")


def quarantine(path: str) -> None:
    Quarantine(path, 10**6).keep(EventId("s", 0, 1), "why", None)
    assert len(read_index(path)) == 1


def write_cxi(path: str) -> None:
    CxiWriter(path).close()


TAKES: dict[str, Callable[[str], object]] = {
    "spool": lambda path: Spool(path).close(),
    "quarantine": quarantine,
    "balance": lambda path: write_balance(path, {"a": 1}),
    "cxi": write_cxi,
    "npz": save_npz,
    "weights": load,
}


@pytest.mark.parametrize("what", TAKES)
def test_what_takes_a_path_expands_it(home: Path, what: str) -> None:
    TAKES[what]("~/one")
    TAKES[what]("${PLACE}/two")
    assert {path.stem for path in home.iterdir()} == {"one", "two"}
    assert not list(Path.cwd().iterdir())
    with pytest.raises(ValueError, match="NOWHERE"):
        TAKES[what]("$NOWHERE/three")
    assert not list(Path.cwd().iterdir())


def test_settings_have_their_paths_expanded_from_the_start(home: Path) -> None:
    address = QueueAddress("q", spool="~/spool", quarantine="$PLACE/quarantine")
    assert (address.spool, address.quarantine) == (f"{home}/spool", f"{home}/quarantine")
    assert CxiOutput("~/cxi").directory == f"{home}/cxi"
    assert QueueWriter(address, balance="~/b.json").balance == f"{home}/b.json"
    assert WeightsExport("$PLACE/w.safetensors").path == f"{home}/w.safetensors"


def test_a_variable_that_is_not_set_ends_a_command_before_it_begins(home: Path) -> None:
    with pytest.raises(ValueError, match="NOWHERE"):
        QueueAddress("q", spool="$NOWHERE/spool")
    with pytest.raises(ValueError, match="NOWHERE"):
        feed(Simulator(num_events=1), QueueAddress("q"), balance="$NOWHERE/b.json")
    with pytest.raises(ValueError, match="NOWHERE"):
        export_weights("$NOWHERE/last.ckpt", "w.safetensors")
    with pytest.raises(ValueError, match="NOWHERE"):
        doctor(directory="$NOWHERE/cxi")


def test_paths_that_lightning_takes_are_expanded(home: Path) -> None:
    class Training(FitCLI):
        """Everything is made; nothing runs."""

        def fit(self, **kwargs: object) -> None:
            pass

    configs = [CONFIGS / "train.yaml", CONFIGS / "models" / "peaknet_small.yaml"]
    words = [word for path in configs for word in ("-c", str(path))]
    settings = ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true"]
    cli = Training(["fit", *words, *settings, "--trainer.default_root_dir", "$PLACE/runs"])
    assert cli.trainer.default_root_dir == f"{home}/runs"
