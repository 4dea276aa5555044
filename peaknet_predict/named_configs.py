"""Configurations that ship with the package, which a command line names without a path."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]

from peaknet_predict.config_files import ConfigurationError
from peaknet_predict.process.files import expanded

_FOLDER = Path(__file__).parent / "configs"


def shipped_configs() -> dict[str, Path]:
    """Return the files that ship, by name: ``demo``, ``models/snr``, ``slurm.sbatch``."""
    files = sorted(path for path in _FOLDER.rglob("*") if path.is_file())
    return {str(path.relative_to(_FOLDER)).removesuffix(".yaml"): path for path in files}


def find_config(value: str) -> str:
    """Return the path of a configuration that a command line names.

    Parameters
    ----------
    value
        A name, a path, or a configuration written out, which is returned as it is.

    Raises
    ------
    ConfigurationError
        If it is neither; lists the available names.
    """
    shipped = {name: path for name, path in shipped_configs().items() if path.suffix == ".yaml"}
    if value in shipped:
        return str(shipped[value])
    if value.lstrip()[:1] == "{" or "\n" in value:
        return value
    path = expanded(value)
    if path.is_file():
        return str(path)
    close = get_close_matches(path.stem, [Path(name).name for name in shipped], n=1)
    meant = [name for name in shipped if close and Path(name).name == close[0]]
    raise ConfigurationError(
        f"there is no configuration {value!r}: no such file in {Path.cwd()}, and those that ship "
        f"are {', '.join(shipped)}" + "".join(f"; did you mean {name}?" for name in meant)
    )


class NamedConfig(ActionConfigFile):
    """The option ``-c``: a path, as for jsonargparse, or the name of a configuration that ships."""

    def __call__(
        self, parser: Any, namespace: Any, values: Any, option_string: str | None = None
    ) -> None:
        """Put the configuration's values into what has been parsed so far."""
        self.apply_config(parser, namespace, self.dest, find_config(values))


def configs(name: str | None = None, output: str | None = None) -> None:
    """List the configurations that ship, or copy one.

    Parameters
    ----------
    name
        The configuration to show or copy, as it is listed.
    output
        The file to write. There must be none of that name yet.

    Raises
    ------
    ConfigurationError
        If there is no such configuration.
    FileExistsError
        If there is such a file.
    """
    shipped = shipped_configs()
    if name is None:
        if output is not None:
            raise ConfigurationError("say which configuration to copy: configs NAME -o FILE")
        for known, path in shipped.items():
            print(f"{known:<22}  {_description(path)}")
        return
    if name not in shipped:
        raise ConfigurationError(
            f"no configuration that ships is called {name!r}; there are {', '.join(shipped)}"
        )
    text = shipped[name].read_text(encoding="utf-8")
    if output is None:
        print(text, end="")
        return
    try:
        with expanded(output).open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise FileExistsError(f"{output} is there already: give another name") from error


def _description(path: Path) -> str:
    """Return a file's first comment, up to its first colon or full stop."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = []
    for line in lines[1:] if lines[0].startswith("#!") else lines:
        if not line.strip("# "):
            break
        comment.append(line.lstrip("# "))
    text = " ".join(comment)
    return min((text.partition(end)[0] for end in (": ", ". ")), key=len).removesuffix(".")
