"""Checks of configurations: everything in them is made, and nothing runs."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

from peaknet_predict.complaints import innermost
from peaknet_predict.config_files import ConfigurationError
from peaknet_predict.doctor.finding import Finding
from peaknet_predict.named_configs import find_config
from peaknet_predict.sources import EventSource

_OURS = {"peaknet_predict"}


def _check_code(config: list[str]) -> Iterator[Finding]:
    """Name the code that configurations bring along: it runs as the user."""
    import yaml

    def class_paths(value: object) -> Iterator[str]:
        if isinstance(value, dict):
            if isinstance(value.get("class_path"), str):
                yield value["class_path"]
            value = list(value.values())
        if isinstance(value, list):
            for part in value:
                yield from class_paths(part)

    named = {
        name for path in config for name in class_paths(yaml.safe_load(Path(path).read_text()))
    }
    foreign = sorted(name for name in named if name.partition(".")[0] not in _OURS and "." in name)
    if foreign:
        yield Finding(
            "warn",
            f"the configuration runs code that is not this program's: {', '.join(foreign)}; it "
            "runs as you, so know where it comes from",
        )


def _trains(config: list[str]) -> bool:
    """Whether configurations are of `fit`: their data can be trained on."""
    import yaml
    from lightning import LightningDataModule

    name = ""
    for path in config:
        data = (yaml.safe_load(Path(path).read_text()) or {}).get("data") or {}
        name = data.get("class_path", name)
    module, _, class_name = name.rpartition(".")
    if not module:
        return False
    kind = getattr(importlib.import_module(module), class_name)
    loader = getattr(kind, "train_dataloader", LightningDataModule.train_dataloader)
    return loader is not LightningDataModule.train_dataloader


def _check_source(source: EventSource | None) -> Iterator[Finding]:
    if source is None:
        return
    try:
        source.check()
    except ValueError as error:
        yield Finding("FAIL", f"source: {error}")
    else:
        yield Finding("ok", f"source: {len(source)} events, readable from here")


def check_configuration(config: list[str]) -> Iterator[Finding]:
    """Parse configurations together, make everything in them, and look at the source of events."""
    from peaknet_predict.lightning_cli import FitCLI, PredictCLI
    from peaknet_predict.module import PeakNetModule

    class Prediction(PredictCLI):
        """Everything is made; nothing runs."""

        def predict(self, **kwargs: object) -> None:
            pass

    class Training(FitCLI):
        """The same."""

        def fit(self, **kwargs: object) -> None:
            pass

    trains = False
    try:
        paths = [find_config(one) for one in config]
        words = [word for path in paths for word in ("-c", path)]
        trains = _trains(paths)
        cli = Training(["fit", *words]) if trains else Prediction(["predict", *words])
        model = cli.model
    except (ConfigurationError, OSError, ValueError) as error:
        yield Finding("FAIL", f"{' + '.join(config)}: {innermost(str(error))}")
    except Exception as error:
        yield Finding("FAIL", f"{' + '.join(config)}: {type(error).__name__}: {error}")
    else:
        yield Finding("ok", f"{' + '.join(config)}: parsed, network and data could be made")
        yield from _check_code(paths)
        yield from _check_source(getattr(cli.datamodule, "source", None))
        if not trains and isinstance(model, PeakNetModule) and model.provenance.is_random:
            yield Finding(
                "warn",
                f"{type(model.net).__name__} predicts with random parameters (random_weights: "
                "true): its peaks will be random",
            )
