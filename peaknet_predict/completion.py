"""Completion in the shell, as shtab makes it from parsers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from importlib.util import find_spec

from jsonargparse import ArgumentParser

from peaknet_predict.config_files import ConfigurationError
from peaknet_predict.named_configs import shipped_configs

_OPTION = re.compile(r"^  (?:(-\w), )?--([\w.-]+)", re.MULTILINE)


def completion(
    shell: str, makers: Mapping[str, Callable[[], ArgumentParser]], helps: Mapping[str, str]
) -> str:
    """Return the script that completes commands and options.

    Parameters
    ----------
    shell
        ``bash``, ``zsh``, ``tcsh`` or ``fish``.
    makers
        What makes a command's parser, by the command's name.
    helps
        Help texts of commands whose parsers know thousands of options: those that the text names
        are completed.

    Raises
    ------
    ConfigurationError
        If shtab is not installed, or does not know the shell.
    """
    if find_spec("shtab") is None:
        raise ConfigurationError("for completion: pip install 'peaknet-predict[completion]'")
    import shtab

    if shell not in shtab.SUPPORTED_SHELLS:
        known = ", ".join(shtab.SUPPORTED_SHELLS)
        raise ConfigurationError(f"no completion for {shell!r}; there is {known}")
    root = ArgumentParser(prog="peaknet-predict")
    commands = root.add_subcommands(required=False)
    for name, make in makers.items():
        parser = make()
        commands.add_subcommand(name, parser, help=parser.description)
    for name, text in helps.items():
        commands.add_subcommand(name, _parser_of(text), help=f"see {name} --help")
    script: str = root.get_completion_script(f"shtab-{shell}")
    return script


def _parser_of(text: str) -> ArgumentParser:
    """Return a parser of the options that a help text names."""
    names = [name for name, path in shipped_configs().items() if path.suffix == ".yaml"]
    parser = ArgumentParser()
    for short, option in _OPTION.findall(text):
        if option == "config":
            parser.add_argument("-c", "--config", choices=names)
        else:
            parser.add_argument(f"--{option}", *([short] if short else []))
    return parser
