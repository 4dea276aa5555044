"""The commands: ``peaknet-predict predict | feed | write-cxi | fit | export | doctor``."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from jsonargparse import ArgumentParser

from peaknet_predict import __version__
from peaknet_predict.config_files import ConfigurationError, refuse_duplicate_keys
from peaknet_predict.cxi.writer import CxiWriteError
from peaknet_predict.process.balance import (
    EXIT_FAILED,
    EXIT_INCOMPLETE,
    EXIT_SURVIVED,
    BalanceError,
    SurvivedError,
)
from peaknet_predict.queues import ClusterError, QueueError

log = logging.getLogger("peaknet_predict")

EXIT_USAGE = 2
"""The command line or the configuration is wrong; as argparse ends, too."""

_USAGE = """usage: peaknet-predict COMMAND [options]     (COMMAND --help shows a command's options)
       peaknet-predict --version

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
        return 0 if words else EXIT_USAGE
    if words[0] == "--version":
        print(f"peaknet-predict {__version__}")
        return 0
    if words[0] not in commands:
        print(f"there is no command {words[0]!r}\n\n{_USAGE}", file=sys.stderr)
        return EXIT_USAGE
    if not {"-h", "--help", "--print_config"} & set(words):
        log.info("peaknet-predict %s: %s", __version__, words[0])
    try:
        return commands[words[0]](words[1:])
    except BalanceError as error:
        log.error("%s", error)
        return EXIT_INCOMPLETE
    except SurvivedError as error:
        log.error("%s", error)
        return EXIT_SURVIVED
    except ConfigurationError as error:
        log.error("%s", error)
        return EXIT_USAGE
    except (ClusterError, QueueError, CxiWriteError, OSError) as error:
        log.error("%s", error)
        log.debug("where that was", exc_info=True)
        return EXIT_FAILED
    except ValueError as error:
        # A wrong setting, nearly always: the sentence is what helps, a traceback hides it.
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
    from peaknet_predict.lightning_cli import PredictCLI

    with _trainer_errors():
        return PredictCLI(args).exit_code


def _fit(args: list[str] | None) -> int:
    from peaknet_predict.lightning_cli import FitCLI

    with _trainer_errors():
        trainer = FitCLI(args).trainer
    return EXIT_INCOMPLETE if trainer.interrupted else 0


@contextmanager
def _trainer_errors() -> Iterator[None]:
    """Turn Lightning's complaints about the trainer's settings into what to do about them."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    try:
        yield
    except MisconfigurationException as error:  # most often a GPU that is not there
        raise ValueError(
            f"the trainer cannot be made: {str(error).strip().rstrip('.!')}. `peaknet-predict "
            "doctor` says what this machine has; -c configs/topology/cpu.yaml needs no GPU"
        ) from error


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
    refuse_duplicate_keys(args)
    settings: dict[str, Any] = parser.instantiate(parser.parse_args(args)).as_dict()
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
