"""The commands: ``peaknet-predict predict | feed | write-cxi | fit | export | doctor``."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
from jsonargparse import ArgumentParser
from lightning import LightningDataModule, LightningModule
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from peaknet_predict.cxi.writer import CxiWriteError
from peaknet_predict.process.balance import (
    EXIT_FAILED,
    EXIT_INCOMPLETE,
    EXIT_SURVIVED,
    BalanceError,
    SurvivedError,
)
from peaknet_predict.process.stopping import GRACE_S, listen_again, stop_requests
from peaknet_predict.process.supervise import Layout, note_started, supervise
from peaknet_predict.queues import ClusterError, QueueError

log = logging.getLogger("peaknet_predict")

_USAGE = """usage: peaknet-predict COMMAND [options]     (COMMAND --help shows a command's options)

  predict     find peaks: input queue -> network -> output queue
  feed        push events from files or the simulator into an input queue
  write-cxi   write results from an output queue to CXI files
  fit         train a network, on simulated shots or on files with known peaks
  export      write a checkpoint's network as a weight file for predict
  doctor      check installation, GPU, Ray and a configuration, and say what to do

exit codes: 0 done, every event accounted for; 1 could not do it, the log's last line says why;
            2 wrong command line or configuration; 3 ended, but interrupted or incomplete;
            4 every event accounted for, but a process of the run died and others did its work
"""


class PredictCLI(LightningCLI):
    """Lightning's command line, cut down to prediction on streams."""

    exit_code = 0

    def __init__(self, args: Sequence[str] | None) -> None:
        self._words = list(sys.argv[1:] if args is None else args)
        for harmless in _HARMLESS_WARNINGS:
            warnings.filterwarnings("ignore", message=harmless)
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
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
            args=None if args is None else list(args),
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Offer ``predict`` alone, without the parameters that a stream cannot have.

        Nor with a checkpoint: Lightning would put its settings in place of the configuration's.
        Weights are an argument of the network.
        """
        hidden = {"model", "dataloaders", "datamodule", "return_predictions"}
        return {"predict": hidden | {"ckpt_path", "weights_only"}}

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
        with stop_requests(getattr(self.datamodule, "grace_s", GRACE_S), begun=False) as stop:
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


class FitCLI(LightningCLI):
    """Lightning's command line, cut down to training."""

    def __init__(self, args: Sequence[str] | None) -> None:
        for harmless in _HARMLESS_WARNINGS:
            warnings.filterwarnings("ignore", message=harmless)
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={
                # Nothing has been averaged before the first step, and validation takes its time.
                "num_sanity_val_steps": 0,
                # The data give every process batches of its own.
                "use_distributed_sampler": False,
            },
            args=None if args is None else list(args),
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Offer ``fit`` alone."""
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule", "weights_only"}
        }


class _Started(L.Callback):
    """Tells the supervisor when this rank needs no other any more."""

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Lightning's handler of SIGTERM talks to the other ranks, which may be gone.
        listen_again()
        note_started(trainer.local_rank)


_HARMLESS_WARNINGS = (
    # The batch's identity travels in the batch itself.
    "Couldn't infer the batch indices",
    # That is the point: predict_step moves the pixels without waiting.
    "You have overridden `transfer_batch_to_device`",
    # Between Lightning and torch; nothing a user could change.
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated",
    # Batches are made where the queue is read; worker processes would only copy them.
    r"The '\w+_dataloader' does not have many workers",
)


def main(args: Sequence[str] | None = None) -> int:
    """Run a command and return the process's exit code.

    Parameters
    ----------
    args
        The words of the command line; those of this process by default.
    """
    words = list(sys.argv[1:] if args is None else args)
    _set_up_logging()
    commands: dict[str, Callable[[list[str]], int]] = {
        # None: Lightning reads the command line itself, as it does again in every rank it starts.
        "predict": lambda rest: _predict(None if args is None else ["predict", *rest]),
        "feed": _feed,
        "write-cxi": _write_cxi,
        "fit": lambda rest: _fit(None if args is None else ["fit", *rest]),
        "export": _export,
        "doctor": _doctor,
    }
    if not words or words[0] in ("-h", "--help"):
        print(_USAGE)
        return 0 if words else 2
    if words[0] not in commands:
        print(f"there is no command {words[0]!r}\n\n{_USAGE}", file=sys.stderr)
        return 2
    try:
        return commands[words[0]](words[1:])
    except BalanceError as error:
        log.error("%s", error)
        return EXIT_INCOMPLETE
    except SurvivedError as error:
        log.error("%s", error)
        return EXIT_SURVIVED
    except (ClusterError, QueueError, CxiWriteError, FileNotFoundError) as error:
        log.error("%s", error)
        return EXIT_FAILED
    except MisconfigurationException as error:
        # Lightning's, of the trainer's settings: most often a GPU that is not there.
        log.error(
            "the trainer cannot be made: %s. `peaknet-predict doctor` says what this machine has; "
            "-c configs/topology/cpu.yaml needs no GPU",
            str(error).strip().rstrip(".!"),
        )
        return EXIT_FAILED
    except ValueError as error:
        # Of a setting, nearly always: the sentence is what helps, a traceback hides it.
        log.error("%s", error)
        log.debug("where that was", exc_info=True)
        return EXIT_FAILED
    except KeyboardInterrupt:
        log.error("stopped at once; what was under way goes back when its leases end")
        return EXIT_INCOMPLETE


def run() -> None:
    """Entry point of the console script."""
    sys.exit(main())


def _predict(args: list[str] | None) -> int:
    return PredictCLI(args).exit_code


def _fit(args: list[str] | None) -> int:
    trainer = FitCLI(args).trainer
    return EXIT_INCOMPLETE if trainer.interrupted else 0


def _export(args: list[str]) -> int:
    from peaknet_predict.training.export import export_weights

    parser = _parser("export", "Write the network of a checkpoint as a weight file for predict.")
    parser.add_function_arguments(export_weights)
    export_weights(**_instantiated(parser, args))
    return 0


def _feed(args: list[str]) -> int:
    from peaknet_predict.feed import feed

    parser = _parser("feed", "Push events into an input queue and mark the end of the stream.")
    parser.add_function_arguments(feed)
    report = feed(**_instantiated(parser, args))
    log.info("%s%s", report, "; interrupted" if report.interrupted else "")
    return EXIT_INCOMPLETE if report.interrupted else 0


def _write_cxi(args: list[str]) -> int:
    from peaknet_predict.consume import write_cxi

    parser = _parser("write-cxi", "Write results from an output queue to CXI files.")
    parser.add_function_arguments(write_cxi)
    report = write_cxi(**_instantiated(parser, args))
    log.info("%s%s", report, "; interrupted" if report.interrupted else "")
    for producer, reason in report.failures.items():
        log.error("the stream is incomplete: %s ended early (%s)", producer, reason)
    whole = report.balanced and not report.failures and not report.interrupted
    return 0 if whole else EXIT_INCOMPLETE


def _doctor(args: list[str]) -> int:
    from peaknet_predict.doctor import doctor

    parser = _parser("doctor", "Check what a run needs, and say what to do about what is found.")
    parser.add_function_arguments(doctor)
    return EXIT_FAILED if doctor(**_instantiated(parser, args)) else 0


def _parser(command: str, description: str) -> ArgumentParser:
    parser = ArgumentParser(prog=f"peaknet-predict {command}", description=description)
    parser.add_argument("-c", "--config", action="config", help="a YAML file with these options")
    return parser


def _instantiated(parser: ArgumentParser, args: list[str]) -> dict[str, Any]:
    settings: dict[str, Any] = parser.instantiate_classes(parser.parse_args(args)).as_dict()
    settings.pop("config", None)
    return settings


def _set_up_logging() -> None:
    """Show our own log on standard error, with the time; leave other libraries as they are."""
    if log.handlers:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
