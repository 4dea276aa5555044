"""Group commit: puts that come together share one sync of the write-ahead log."""

from __future__ import annotations

import asyncio

from peaknet_predict.queues.spool import Spool


class GroupCommit:
    """Brings the spool's files on disk, once for all calls that wait for it.

    Parameters
    ----------
    spool
        The write-ahead log; None for a queue in memory.
    """

    def __init__(self, spool: Spool | None) -> None:
        self._spool = spool
        self._syncing = asyncio.Lock()
        self._synced = (0, 0)

    async def wait(self) -> None:
        """Return once everything that was appended up to now is on disk."""
        if self._spool is None:
            return
        wanted = self._spool.position
        async with self._syncing:
            if self._synced >= wanted:
                return
            reached, sync = self._spool.position, self._spool.syncing()
            await asyncio.get_running_loop().run_in_executor(None, sync)
            self._synced = reached
