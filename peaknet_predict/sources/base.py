"""The interface of all sources of events, and functions that file sources share."""

from __future__ import annotations

import glob
import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from peaknet_predict.process.files import expanded
from peaknet_predict.types import Image

logger = logging.getLogger(__name__)

SKIP_HINT = ". To leave out files that cannot be read, set skip_unreadable: true"


@dataclass(frozen=True)
class SkippedFile:
    """A file that a source leaves out, at the user's request, because it cannot be read.

    Attributes
    ----------
    path
        The file.
    reason
        Why it cannot be read.
    events
        How many events it holds; None if unknown.
    """

    path: Path
    reason: str
    events: int | None


class EventSource(ABC):
    """A finite, repeatable sequence of detector readouts.

    Events are numbered from 0 in an order that does not change between passes, so that a feeder
    that was stopped can continue where it left off.
    """

    skipped: Sequence[SkippedFile] = ()
    """Files that were left out."""

    def check(self) -> None:
        """Make sure that this process can read the events, and log how they are interpreted.

        A source may be made in one process and read in another, with another environment. The
        reading process calls this first.

        Raises
        ------
        ValueError
            If no event can be read or processed; the message says why and what to do.
        """
        return

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of events of one pass."""

    @abstractmethod
    def events(self, first: int = 0) -> Iterator[tuple[int, Image, float]]:
        """Iterate over one pass.

        Parameters
        ----------
        first
            Number of the first event wanted; the ones before it are not read.

        Yields
        ------
        idx, image, photon_energy
            The event's number, its (P, H, W) or (H, W) pixels in the source's own dtype, and the
            photon energy in eV. A record that cannot be used is still yielded, so that it is
            refused and counted downstream: the photon energy is NaN where it is missing, and the
            image is the reason in words where the frame is unreadable, see `unreadable`.

        Raises
        ------
        ValueError
            If `first` lies outside 0 ... ``len(self)``.
        """


def check_first(first: int, num_events: int) -> None:
    """Raise a `ValueError` unless a pass over `num_events` events may start at `first`."""
    if not 0 <= first <= num_events:
        raise ValueError(f"first must lie in 0 ... {num_events}, the number of events; got {first}")


def resolve_paths(path: str | Sequence[str]) -> list[Path]:
    """List the files that a path, a glob pattern or a list of either stands for.

    Parameters
    ----------
    path
        Patterns understand ``*``, ``?``, ``[...]`` and ``**``. If a file with exactly that name
        exists, the pattern is taken literally.

    Returns
    -------
    list of Path
        Absolute, because cluster workers have another working directory. In the given order; the
        matches of a pattern sorted by name.

    Raises
    ------
    FileNotFoundError
        If a file does not exist or a pattern matches nothing.
    ValueError
        If the list is empty or names a file twice.
    """
    patterns = [str(expanded(one)) for one in ([path] if isinstance(path, str) else path)]
    if not patterns:
        raise ValueError("path is an empty list: name at least one file or glob pattern")
    files: list[Path] = []
    for pattern in patterns:
        if Path(pattern).is_file():
            files.append(Path(pattern).absolute())
            continue
        matches = sorted(m for m in glob.glob(pattern, recursive=True) if Path(m).is_file())
        if not matches:
            cause = "matches no file" if glob.has_magic(pattern) else "is not a file"
            raise FileNotFoundError(
                f"{pattern!r} {cause} (looked from {Path.cwd()}); check the path"
            )
        files += [Path(match).absolute() for match in matches]
    twice = next((file for file, count in Counter(files).items() if count > 1), None)
    if twice is not None:
        raise ValueError(f"{twice} is named twice; its events would be processed twice")
    return files


def unreadable(path: Path, record: int, cause: Exception | str) -> Image:
    """Log that a frame cannot be read, and return the reason in place of its pixels.

    Returns
    -------
    ndarray
        () | text. The items of a queue have no field for a reason. This array replaces the image in
        every queue, and `peaknet_predict.batching.check_event` refuses the event with it. Zeros
        could be taken for a measured blank.
    """
    reason = f"{path}: frame {record} is unreadable: {cause}"
    logger.warning("%s", reason)
    return np.array(reason)
