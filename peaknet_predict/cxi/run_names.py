"""Names of files that a directory has once per run: lists of files, balances.

The latest run has the plain name, such as ``files.lst``. An earlier run's file stays under a name
with the run in it, such as ``files_peaks-1a2b3c4d.0.lst``.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path


def with_run(path: Path, run: str) -> Path:
    """Return a path with the run's name in it."""
    label = re.sub(r"[^\w.@#-]", "_", run)[-100:] or "unnamed"
    return path.with_name(f"{path.stem}_{label}{path.suffix}")


def is_displaced(directory: Path, run: str) -> bool:
    """Whether a later run has the plain names, so that this one uses names with its own in them."""
    return any(
        any(directory.glob(with_run(Path(plain), run).name))
        for plain in ("files*.lst", "*_balance.json")
    )


def keep_under_run_name(path: Path, run: str | None) -> None:
    """Give a file a second name with its run in it, so that another run can use the plain one.

    Parameters
    ----------
    path
        The file; nothing happens if there is none.
    run
        The run it belongs to; None if unknown.

    Raises
    ------
    OSError
        If that is not possible.
    """
    with contextlib.suppress(FileNotFoundError):
        if run is None:
            run = f"before-{int(path.stat().st_mtime)}"
        # A link fails if the name exists: another writer of the new run was faster, and the plain
        # name may already stand for the new run's file.
        with contextlib.suppress(FileExistsError):
            os.link(path, with_run(path, run))
