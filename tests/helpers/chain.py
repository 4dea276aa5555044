"""A whole run, from a queue to CXI files, with the shipped configuration."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import yaml

from peaknet_predict.cxi.file import read_ids
from tests.helpers.paths import CONFIGS


def chain(
    tmp_path: Path, cluster: str, queues: tuple[str, str], topology: str, **data: Any
) -> tuple[str, ...]:
    """Write the shipped configuration for these queues, with short leases and CXI files."""
    config = yaml.safe_load((CONFIGS / "predict.yaml").read_text())
    settings = {"lease_s": 2.0, "producer_timeout_s": 10.0, "quarantine": str(tmp_path / "q")}
    config["data"]["init_args"] |= {"address": cluster, "batch_size": 8, **data}
    config["data"]["init_args"]["queue"] |= {"name": queues[0], **settings}
    config["trainer"]["callbacks"][0]["init_args"]["queue"] |= {"name": queues[1], **settings}
    output = {"directory": str(tmp_path / "cxi")}
    config["trainer"]["callbacks"].insert(
        1, {"class_path": "peaknet_predict.callbacks.cxi_output.CxiOutput", "init_args": output}
    )
    path = tmp_path / "chain.yaml"
    path.write_text(yaml.safe_dump(config))
    model, where = CONFIGS / "models" / "snr.yaml", CONFIGS / "topology" / topology
    return ("predict", "-c", str(path), "-c", str(model), "-c", str(where))


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children]


def written(directory: Path) -> list[int]:
    return sorted(key.idx for path in directory.glob("*.cxi") for key in read_ids(path))
