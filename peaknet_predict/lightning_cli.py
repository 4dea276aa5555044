"""Lightning's command line, cut down to what ``predict`` and ``fit`` need."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any

import lightning as L
from lightning import LightningDataModule, LightningModule
from lightning.fabric.plugins.environments.mpi import MPIEnvironment
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.utilities.model_helpers import is_overridden

from peaknet_predict.complaints import OneSentence
from peaknet_predict.config_files import ConfigurationError, refuse_duplicate_keys
from peaknet_predict.files_data import HARMLESS_WARNINGS
from peaknet_predict.module import PeakNetModule
from peaknet_predict.named_configs import NamedConfig
from peaknet_predict.output_options import (
    add_output_options,
    apply_output_options,
    listed_callbacks,
)
from peaknet_predict.process.files import expanded
from peaknet_predict.process.meeting_point import AGENT_STORE, meeting_of_ranks
from peaknet_predict.process.stopping import GRACE_S, listen_again, stop_requests
from peaknet_predict.process.supervise import Layout, note_started, supervise

# Where mpi4py is installed, Lightning starts MPI to see whether mpirun started the process. Here it
# never did: ranks meet by themselves, and MPI would open sockets of its own in each of them.
MPIEnvironment.detect = staticmethod(lambda: False)  # type: ignore[method-assign]

_HARMLESS_WARNINGS = (
    *HARMLESS_WARNINGS,
    # The batch's identity travels in the batch itself.
    "Couldn't infer the batch indices",
    # `run` puts its options into words for `predict`.
    "LightningCLI's args parameter is intended",
)


class _Parser(OneSentence, LightningArgumentParser):
    """Lightning's parser, which ends with one sentence."""


class _OurCLI(LightningCLI):
    """What `predict` and `fit` share: configurations by name, and errors in one sentence."""

    def __init__(self, args: Sequence[str] | None, **settings: Any) -> None:
        self._words = list(sys.argv[1:] if args is None else args)
        refuse_duplicate_keys(self._words)
        for harmless in _HARMLESS_WARNINGS:
            warnings.filterwarnings("ignore", message=harmless)
        shown = ["--help" if word == "--help-all" else word for word in self._words]
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            parser_class=_Parser,
            parser_kwargs={"prog": "peaknet-predict"},
            args=None if shown == sys.argv[1:] else shown,
            **settings,
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make a parser whose ``-c`` knows the configurations that ship."""
        parser = _Parser(**kwargs)
        parser.add_argument(
            "-c", "--config", action=NamedConfig, help="a configuration: name or YAML file"
        )
        return parser

    def _meeting(self) -> AbstractContextManager[None]:
        """Have ranks that something else has started (`srun`) meet at one address only."""
        environment = getattr(self.trainer.strategy, "cluster_environment", None)
        if environment is None or self.trainer.world_size == 1 or os.environ.get(AGENT_STORE):
            return nullcontext()
        return meeting_of_ranks(
            environment.main_address,
            environment.main_port,
            self.trainer.num_nodes,
            self.trainer.is_global_zero,
        )

    def _refuse_data_without(self, loader: str, other_command: str) -> None:
        """Refuse data for another command than this one."""
        class_path = self.config[self.subcommand].data.class_path
        module, _, name = class_path.rpartition(".")
        if not is_overridden(loader, getattr(import_module(module), name), LightningDataModule):
            raise ConfigurationError(
                f"a configuration for {other_command} was given to {self.subcommand}: the data "
                f"would come from {name}, which has no {loader}"
            )


class PredictCLI(_OurCLI):
    """Lightning's command line, cut down to prediction on streams."""

    exit_code = 0

    def __init__(self, args: Sequence[str] | None) -> None:
        # What Lightning says about devices and loggers helps nobody who reads the log of a run.
        logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
        super().__init__(
            args,
            seed_everything_default=False,
            save_config_callback=None,
            trainer_defaults={
                # A stream has no length, and Lightning fetches one batch ahead of a loader without
                # one: batch N would wait for batch N+1. Any finite limit switches that off.
                "limit_predict_batches": 10**9,
                "logger": False,
                "enable_checkpointing": False,
                "enable_progress_bar": False,
                "use_distributed_sampler": False,
            },
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Offer ``predict`` alone, without the parameters that a stream cannot have.

        Nor with a checkpoint: Lightning would put its settings in place of the configuration's.
        Weights are an argument of the network.
        """
        hidden = {"model", "dataloaders", "datamodule", "return_predictions"}
        return {"predict": hidden | {"ckpt_path", "weights_only"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Predict events of a queue with a `PeakNetModule`, unless other classes are named."""
        _default_class(parser, "model", "peaknet_predict.module.PeakNetModule")
        _default_class(parser, "data", "peaknet_predict.data.QueueDataModule")
        add_output_options(parser)

    def before_instantiate_classes(self) -> None:
        """Put the options of the output where they belong."""
        self._refuse_data_without("predict_dataloader", "fit")
        config = self.config[self.subcommand]
        apply_output_options(config.output, config.trainer.callbacks)

    def before_predict(self) -> None:
        """Refuse a run without a writer or with random weights before anything is started."""
        callbacks: list[L.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(one, BasePredictionWriter) for one in callbacks):
            raise ConfigurationError(
                "no QueueWriter among trainer.callbacks: results would go nowhere. A list of "
                "callbacks in a later -c, or --trainer.callbacks, replaces the whole list: name "
                "the QueueWriter there too, or add to the list with callbacks+"
            )
        if isinstance(self.model, PeakNetModule):
            self.model.provenance.check()

    def predict(self, **kwargs: Any) -> None:
        """Run the prediction; results leave through the writer and are never kept.

        Several ranks on this machine become processes under a supervisor, which this one is.
        """
        layout = self._layout()
        if layout is not None:
            grace_s = getattr(self.datamodule, "grace_s", GRACE_S)
            self.exit_code = supervise(self._words, layout, grace_s)
            return
        self.trainer.callbacks.append(_Started())  # type: ignore[attr-defined]
        # What there is to finish begins with the first lease, in a block of the dataset's own.
        grace_s = getattr(self.datamodule, "grace_s", GRACE_S)
        with self._meeting(), stop_requests(grace_s, begun=False) as stop:
            try:
                self.trainer.predict(**kwargs, return_predictions=False)
            except SystemExit:
                # What Lightning makes of a KeyboardInterrupt.
                if stop.at_once:
                    raise KeyboardInterrupt from None
                raise

    def _layout(self) -> Layout | None:
        """Return the ranks to be started here; None if this is one, or the only one."""
        launcher = self.trainer.strategy.launcher
        if not isinstance(launcher, _SubprocessScriptLauncher):
            return None
        environment = launcher.cluster_environment
        if environment.creates_processes_externally or launcher.num_processes < 2:
            return None
        return Layout(
            launcher.num_processes,
            launcher.num_processes * launcher.num_nodes,
            environment.node_rank(),
            environment.main_address,
            environment.main_port,
        )


class FitCLI(_OurCLI):
    """Lightning's command line, cut down to training."""

    def __init__(self, args: Sequence[str] | None) -> None:
        super().__init__(
            args,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={
                # Nothing has been averaged before the first step, and validation takes its time.
                "num_sanity_val_steps": 0,
                # The data give every process batches of its own.
                "use_distributed_sampler": False,
            },
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Offer ``fit`` alone."""
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule", "weights_only"}
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Train a `PeakNetTraining`, unless a configuration names another class."""
        _default_class(parser, "model", _TRAINING)

    def before_instantiate_classes(self) -> None:
        """Expand the paths that Lightning takes: it knows ``~``, but no variables."""
        self._refuse_data_without("train_dataloader", "predict")
        config = self.config[self.subcommand]
        for key in ("trainer.default_root_dir", "ckpt_path"):
            if config.get(key) is not None:
                config[key] = str(expanded(config[key]))
        for callback in listed_callbacks(config.trainer.callbacks):
            if callback.init_args.get("dirpath") is not None:
                callback.init_args.dirpath = str(expanded(callback.init_args.dirpath))

    def before_fit(self) -> None:
        """Refuse a model that can only predict."""
        if not is_overridden("training_step", self.model):
            raise ValueError(
                f"{type(self.model).__name__} cannot be trained: set model.class_path to "
                f"{_TRAINING}, or leave it out (fit takes that class by itself)"
            )

    def fit(self, **kwargs: Any) -> None:
        """Train."""
        with self._meeting():
            self.trainer.fit(**kwargs)


_TRAINING = "peaknet_predict.training.module.PeakNetTraining"


def _default_class(parser: LightningArgumentParser, key: str, class_path: str) -> None:
    """Let a configuration leave the class out: a network's then serves ``predict`` and ``fit``."""
    parser.set_defaults({key: {"class_path": class_path}})


class _Started(L.Callback):
    """Tells the supervisor when this rank needs no other any more."""

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Lightning's handler of SIGTERM talks to the other ranks, which may be gone.
        listen_again()
        note_started(trainer.local_rank)
