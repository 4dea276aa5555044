"""Options for values that stand in the list of callbacks."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import yaml

from peaknet_predict.callbacks.cxi_output import CxiOutput
from peaknet_predict.callbacks.queue_writer import QueueWriter
from peaknet_predict.config_files import ConfigurationError
from peaknet_predict.lightning_cli import PredictCLI
from tests.helpers.paths import CONFIGS

DEMO = ("-c", str(CONFIGS / "demo.yaml"), "-c", str(CONFIGS / "models" / "snr.yaml"))


class Parsed(PredictCLI):
    """Everything is made; nothing runs."""

    def predict(self, **kwargs: object) -> None:
        pass


def made(*words: str) -> tuple[QueueWriter, CxiOutput]:
    callbacks = Parsed(["predict", *words]).trainer.callbacks  # type: ignore[attr-defined]
    (writer,) = (one for one in callbacks if isinstance(one, QueueWriter))
    (output,) = (one for one in callbacks if isinstance(one, CxiOutput))
    return writer, output


def test_options_reach_the_callbacks_and_leave_the_rest(tmp_path: Path) -> None:
    plain, files = made(*DEMO)
    words = ("--output.directory", str(tmp_path), "--output.min_peaks", "3")
    writer, output = made(
        *DEMO, *words, "--output.queue.name", "mine", "--output.queue.lease_s", "9"
    )
    assert (output.directory, output.min_peaks) == (str(tmp_path), 3)
    assert (output.prefix, output.events_per_file) == (files.prefix, files.events_per_file)
    assert (writer.queue_address.name, writer.queue_address.lease_s) == ("mine", 9.0)
    assert writer.queue_address.quarantine == plain.queue_address.quarantine


@pytest.mark.thorough
def test_a_configuration_may_have_them_and_what_is_printed_is_one(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(yaml.safe_dump({"output": {"directory": "from_file", "min_peaks": 4}}))
    words = (*DEMO, "-c", str(mine), "--output.min_peaks", "5", "--output.queue.name", "mine")
    said = io.StringIO()
    with redirect_stdout(said), pytest.raises(SystemExit):
        Parsed(["predict", *words, "--print_config"])
    printed = tmp_path / "printed.yaml"
    printed.write_text(said.getvalue())
    for given in (words, ("-c", str(printed))):
        writer, output = made(*given)
        assert (output.directory, output.min_peaks) == ("from_file", 5)
        assert writer.queue_address.name == "mine"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--output.directory", "x"), "one CxiOutput, and trainer.callbacks has 0: QueueWriter"),
        (("--output.queue.title", "x"), "title"),
        (("--output.queue.lease_s", "soon"), "output.queue: .*soon"),
    ],
)
def test_what_no_callback_takes_is_refused(words: tuple[str, ...], complaint: str) -> None:
    configs = ("-c", str(CONFIGS / "predict.yaml"), "-c", str(CONFIGS / "models" / "snr.yaml"))
    with pytest.raises(ConfigurationError, match=complaint):
        Parsed(["predict", *configs, *words])
