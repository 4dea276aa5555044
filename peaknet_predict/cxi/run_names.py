"""Names of what a directory has once for each run: lists of files, balances.

The latest run has the plain name, such as ``files.lst``. What an earlier run has there stays under
a name with the run in it, such as ``files_peaks-1a2b3c4d.0.lst``.
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
    """Whether a later run has the plain names, and this one those with its name in them."""
    return any(
        any(directory.glob(with_run(Path(plain), run).name))
        for plain in ("files*.lst", "*_balance.json")
    )


def keep_under_run_name(path: Path, run: str | None) -> None:
    """Give a file a second name with its run in it, so that another run can take the plain one.

    Parameters
    ----------
    path
        The file; nothing happens if there is none.
    run
        The run it belongs to; None if that cannot be told.

    Raises
    ------
    OSError
        If it cannot be given that name.
    """
    with contextlib.suppress(FileNotFoundError):
        if run is None:
            run = f"before-{int(path.stat().st_mtime)}"
        # A link fails where the name exists: another writer of the new run has been faster, and
        # what has the plain name now may be the new run's already.
        with contextlib.suppress(FileExistsError):
            os.link(path, with_run(path, run))
