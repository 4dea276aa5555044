"""The commands: ``peaknet-predict run | predict | feed | write-cxi | fit | export ...``."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from peaknet_predict import __version__
from peaknet_predict.process.balance import EXIT_FAILED, EXIT_INCOMPLETE, EXIT_SURVIVED
from peaknet_predict.process.text import printable
from peaknet_predict.usage import FIT, PREDICT, USAGE

if TYPE_CHECKING:  # everything else is imported when it is needed: help is shown at once
    from jsonargparse import ArgumentParser

log = logging.getLogger("peaknet_predict")

EXIT_USAGE = 2
"""The command line or the configuration is wrong; as argparse ends, too."""


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
        "run": _run_files,
        # None: Lightning reads the command line itself, as it does again in every rank it starts.
        "predict": lambda rest: _predict(None if args is None else ["predict", *rest]),
        "feed": _feed,
        "write-cxi": _write_cxi,
        "fit": lambda rest: _fit(None if args is None else ["fit", *rest]),
        "export": _export,
        "configs": _configs,
        "completion": _completion,
        "doctor": _doctor,
    }
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if words else EXIT_USAGE
    if words[0] == "--version":
        print(f"peaknet-predict {__version__}")
        return 0
    if words[0] not in commands:
        print(f"there is no command {words[0]!r}\n\n{USAGE}", file=sys.stderr)
        return EXIT_USAGE
    brief = {"predict": PREDICT, "fit": FIT}.get(words[0])
    if brief is not None and {"-h", "--help"} & set(words):
        print(brief)
        return 0
    answers = {"-h", "--help", "--help-all", "--print_config"}
    if words[0] not in ("configs", "completion") and not answers & set(words):
        log.info("peaknet-predict %s: %s", __version__, words[0])
    try:
        return commands[words[0]](words[1:])
    except KeyboardInterrupt:
        log.error("stopped at once; what was under way goes back when its leases end")
        return EXIT_INCOMPLETE
    except Exception as error:
        return _ended_by(error)


def _ended_by(error: Exception) -> int:
    """Say in one sentence why a command has ended, and return the exit code; raise a fault."""
    from peaknet_predict.complaints import innermost
    from peaknet_predict.config_files import ConfigurationError
    from peaknet_predict.cxi.writer import CxiWriteError
    from peaknet_predict.process.balance import BalanceError, SurvivedError
    from peaknet_predict.queues import ClusterError, QueueError

    codes = (
        (BalanceError, EXIT_INCOMPLETE),
        (SurvivedError, EXIT_SURVIVED),
        (ConfigurationError, EXIT_USAGE),
        # A ValueError is a wrong setting, nearly always: a traceback would hide what helps.
        ((ClusterError, QueueError, CxiWriteError, OSError, ValueError), EXIT_FAILED),
    )
    code = next((code for kinds, code in codes if isinstance(error, kinds)), None)
    if code is None:
        raise error
    log.error("%s", innermost(str(error)))
    log.debug("where that was", exc_info=error)
    return code


def run() -> None:
    """Entry point of the console script."""
    # So that a configuration can name a class of a module beside it. At the end: a file of the
    # user's that is called like a module of Python must not take its place.
    sys.path.append(os.getcwd())
    sys.exit(main())


def _run_parser() -> ArgumentParser:
    from peaknet_predict.run_files import add_run_options

    parser = _parser("run", "Find the peaks of files and write CXI files, on this machine.")
    add_run_options(parser)
    return parser


def _run_files(args: list[str]) -> int:
    from peaknet_predict.run_files import predict_words

    words = predict_words(**_instantiated(_run_parser(), args))
    log.info("the same as: peaknet-predict %s", shlex.join(words))
    return _predict(words)


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
            "doctor` says what this machine has; -c topology/cpu needs no GPU"
        ) from error


def _export_parser() -> ArgumentParser:
    from peaknet_predict.training.export import export_weights

    parser = _parser("export", "Write the network of a checkpoint as a weight file for predict.")
    parser.add_function_arguments(export_weights)
    return parser


def _export(args: list[str]) -> int:
    from peaknet_predict.training.export import export_weights

    export_weights(**_configured(_export_parser(), args))
    return 0


def _feed_parser() -> ArgumentParser:
    from peaknet_predict.feed import feed

    parser = _parser("feed", "Push events into an input queue and mark the end of the stream.")
    parser.add_function_arguments(feed)
    return parser


def _feed(args: list[str]) -> int:
    from peaknet_predict.feed import feed

    report = feed(**_configured(_feed_parser(), args))
    log.info("%s%s", report, "; interrupted" if report.interrupted else "")
    return EXIT_INCOMPLETE if report.interrupted else 0


def _write_cxi_parser() -> ArgumentParser:
    from peaknet_predict.consume import write_cxi

    parser = _parser("write-cxi", "Write results from an output queue to CXI files.")
    parser.add_function_arguments(write_cxi)
    return parser


def _write_cxi(args: list[str]) -> int:
    from peaknet_predict.consume import write_cxi

    report = write_cxi(**_configured(_write_cxi_parser(), args))
    log.info("%s%s", report, "; interrupted" if report.interrupted else "")
    for producer, reason in report.failures.items():
        log.error("the stream is incomplete: %s ended early (%s)", producer, reason)
    whole = report.balanced and not report.failures and not report.interrupted
    return 0 if whole else EXIT_INCOMPLETE


def _configs_parser() -> ArgumentParser:
    parser = _parser("configs", "List the configurations that ship, show one, or copy it.")
    parser.add_argument("name", nargs="?", help="the one to show or to copy")
    parser.add_argument("-o", "--output", metavar="FILE", help="copy it there")
    return parser


def _configs(args: list[str]) -> int:
    from peaknet_predict.named_configs import configs

    configs(**_instantiated(_configs_parser(), args))
    return 0


def _doctor_parser() -> ArgumentParser:
    from peaknet_predict.doctor import doctor

    parser = _parser("doctor", "Check what a run needs, and say what to do about what is found.")
    parser.add_function_arguments(doctor)
    return parser


def _doctor(args: list[str]) -> int:
    from peaknet_predict.doctor import doctor

    return EXIT_FAILED if doctor(**_configured(_doctor_parser(), args)) else 0


def _completion(args: list[str]) -> int:
    from peaknet_predict.completion import completion

    parser = _parser("completion", "Print the script that completes commands in the shell.")
    parser.add_argument("shell", help="bash, zsh, tcsh or fish")
    makers = {
        "run": _run_parser,
        "feed": _feed_parser,
        "write-cxi": _write_cxi_parser,
        "export": _export_parser,
        "configs": _configs_parser,
        "doctor": _doctor_parser,
    }
    shell = _instantiated(parser, args)["shell"]
    print(completion(shell, makers, {"predict": PREDICT, "fit": FIT}))
    return 0


def _parser(command: str, description: str) -> ArgumentParser:
    from peaknet_predict.complaints import OneSentence

    return OneSentence(prog=f"peaknet-predict {command}", description=description)


def _configured(parser: ArgumentParser, args: list[str]) -> dict[str, Any]:
    """Parse options that a YAML file may hold too."""
    parser.add_argument("-c", "--config", action="config", help="a YAML file with these options")
    settings = _instantiated(parser, args)
    settings.pop("config", None)
    return settings


def _instantiated(parser: ArgumentParser, args: list[str]) -> dict[str, Any]:
    from peaknet_predict.config_files import refuse_duplicate_keys

    refuse_duplicate_keys(args)
    settings: dict[str, Any] = parser.instantiate(parser.parse_args(args)).as_dict()
    return settings


class _OneLine(logging.Formatter):
    """Shows a message on one line: names of files and queues must not forge lines of their own."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))


def _set_up_logging() -> None:
    """Show our own log on standard error, with the time; leave other libraries as they are."""
    if log.handlers:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLine("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
