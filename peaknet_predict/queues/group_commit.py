"""Group commit: puts that come together share one sync of the write-ahead log."""

from __future__ import annotations

import asyncio
import logging
import math
import time

from peaknet_predict.queues.spool import Spool

log = logging.getLogger(__name__)

_PAUSE_S = 0.5  # between two tries of a disk that fails


class GroupCommit:
    """Syncs the spool's files once for all calls that wait for it.

    Parameters
    ----------
    spool
        The write-ahead log; None for a queue in memory.

    Attributes
    ----------
    problem
        Why the latest records are not on disk; None if they are.
    """

    def __init__(self, spool: Spool | None) -> None:
        self.problem: str | None = None
        self._spool = spool
        self._syncing = asyncio.Lock()
        self._synced = (0, 0)

    async def wait(self) -> str | None:
        """Return once everything that was appended up to now is on disk; or why that failed.

        After a failure nothing is confirmed until the spool has gone on in a new file, with
        everything that is not known to be on disk. Each call tries that.
        """
        if self._spool is None:
            return None
        wanted = self._spool.position
        async with self._syncing:
            if self._synced >= wanted:
                return None
            try:
                sync = self._spool.syncing()
                reached = self._spool.position
                await asyncio.get_running_loop().run_in_executor(None, sync)
            except OSError as error:
                if self.problem is None:
                    log.error("spool %s: %s: nothing is confirmed", self._spool.directory, error)
                self.problem = f"the spool {self._spool.directory} cannot be synced: {error}"
                return self.problem
            self._synced, self.problem = reached, None
            return None

    async def wait_long(self, timeout_s: float = math.inf) -> str | None:
        """Wait until everything that was appended up to now is on disk, or time is over.

        Returns
        -------
        str or None
            Why it is not on disk; None if it is.
        """
        deadline = time.monotonic() + timeout_s
        while (problem := await self.wait()) is not None and time.monotonic() < deadline:
            await asyncio.sleep(_PAUSE_S)
        return problem

    async def tidy(self) -> None:
        """Sync what nobody waits for, and delete what is no longer needed."""
        if self._spool is not None:
            await self.wait()
            self._spool.tidy()
