"""A configuration that leaves nobody to take the results is refused before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from peaknet_predict.cli import main
from peaknet_predict.doctor import doctor
from tests.helpers.examples import thorough
from tests.helpers.paths import CONFIGS

SHIPPED = [
    CONFIGS / "demo.yaml",
    CONFIGS / "models" / "snr.yaml",
    CONFIGS / "topology" / "cpu.yaml",
]
REASON = "no QueueWriter among trainer.callbacks: results would go nowhere"
ONLY_RATES = "[{class_path: peaknet_predict.callbacks.rate_log.RateLog}]"


def words(*configs: Path) -> list[str]:
    return [word for config in configs for word in ("-c", str(config))]


@pytest.mark.parametrize("callbacks", ["null", *thorough("[]", ONLY_RATES)])
def test_on_the_command_line(callbacks: str, said: pytest.LogCaptureFixture) -> None:
    assert main(["predict", *words(*SHIPPED), "--trainer.callbacks", callbacks]) == 2
    assert REASON in said.text


@pytest.mark.thorough
def test_in_a_second_configuration_and_doctor_fails(
    tmp_path: Path, said: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"trainer: {{callbacks: {ONLY_RATES}}}")
    assert main(["predict", *words(*SHIPPED, mine)]) == 2
    assert REASON in said.text
    assert doctor(configs=[str(config) for config in [*SHIPPED, mine]]) == 1
    assert REASON in capsys.readouterr().out
