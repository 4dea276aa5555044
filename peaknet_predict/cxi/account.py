"""The counts of a writer, and of a run with all of its writers."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peaknet_predict.cxi.directory import CxiDirectory
from peaknet_predict.cxi.file import CxiSummary
from peaknet_predict.cxi.journal import Journal, JournalContents
from peaknet_predict.cxi.row import CxiRow
from peaknet_predict.cxi.run_names import is_displaced, keep_under_run_name, with_run
from peaknet_predict.keys import KeySet
from peaknet_predict.process.balance import write_balance

log = logging.getLogger(__name__)


@dataclass(slots=True)
class CxiStatistics:
    """What became of the events given to a writer.

    ``taken + filtered_elsewhere == written + filtered + duplicates + handed_over``, and what is
    still in memory.

    Attributes
    ----------
    taken
        Events that `CxiWriter.add` accepted.
    written
        Events in finished files.
    filtered
        Events of the run on record as left out, because they have fewer than `min_peaks` peaks.
    filtered_elsewhere
        How many of these other writers of the run have left out, including dead ones.
    duplicates
        Events that were in a finished file or on record as filtered already, or twice in memory.
    handed_over
        Events given to another writer, because this one had been silent for too long.
    truncated
        Written events of which only the strongest `max_peaks` peaks are listed.
    without_energy
        Written events without a photon energy above zero: CrystFEL cannot index them.
    damaged_records
        Lines of the run's journals that are damaged: events on them are in no count.
    files
        Finished files, in order.
    """

    taken: int = 0
    written: int = 0
    filtered: int = 0
    filtered_elsewhere: int = 0
    duplicates: int = 0
    handed_over: int = 0
    truncated: int = 0
    without_energy: int = 0
    damaged_records: int = 0
    files: list[Path] = field(default_factory=list)

    @property
    def filtered_here(self) -> int:
        """How many events this writer itself left out."""
        return self.filtered - self.filtered_elsewhere


@dataclass(slots=True)
class ConsumeReport:
    """What became of every result that a writer's process took.

    Attributes
    ----------
    taken
        Items taken from the queue.
    refused
        Items that cannot be written, each named in the log and in the queue's quarantine.
    given_back
        Items that could not be written in time and are in the queue again.
    cxi
        The file writer's own counts.
    failures
        Producers that ended their part of the stream early, and why.
    interrupted
        Whether it ended before the stream did: Ctrl-C, SIGTERM, or a problem.
    problem
        The error that ended it; None if there was none.
    run_files
        Files of the whole run, including those of writers that died, once the balance has been
        written.
    """

    taken: int = 0
    refused: int = 0
    given_back: int = 0
    cxi: CxiStatistics = field(default_factory=CxiStatistics)
    failures: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False
    problem: str | None = None
    run_files: list[Path] = field(default_factory=list)

    @property
    def unaccounted(self) -> int:
        """How many of the results taken were neither written, filtered, refused nor given on."""
        cxi = self.cxi
        accounted = cxi.written + cxi.filtered_here + cxi.duplicates + cxi.handed_over
        return self.taken - accounted - self.refused - self.given_back

    @property
    def balanced(self) -> bool:
        """Whether every result taken was written, filtered or refused, and all are on record."""
        whole = self.cxi.damaged_records == 0
        return self.unaccounted == 0 and self.given_back == 0 and whole

    def __str__(self) -> str:
        text = (
            f"taken {self.taken} = written {self.cxi.written} + filtered {self.cxi.filtered_here} "
            f"+ refused {self.refused}"
        )
        for count, what in (
            (self.cxi.duplicates, "in files already"),
            (self.cxi.handed_over, "handed over"),
            (self.given_back, "given back"),
        ):
            text += f" + {what} {count}" if count else ""
        text += f", in {len(self.cxi.files)} files"
        if self.cxi.filtered_elsewhere:
            text += f"; other writers of this run filtered {self.cxi.filtered_elsewhere}"
        if self.unaccounted:
            text += f"; LOST {self.unaccounted} that could not be written"
        if self.cxi.damaged_records:
            text += f"; {self.cxi.damaged_records} lines of journals are damaged, and not counted"
        if self.cxi.truncated:
            text += (
                f"; {self.cxi.truncated} events had more peaks than a file's lists hold, and only "
                "the strongest are listed: raise max_peaks"
            )
        return text


class RunAccount:
    """Keeps the counts of one writer, and draws up the balance of its run.

    Parameters
    ----------
    directory
        Where the files are.
    journal
        Of this writer.
    run
        The run.
    resumed
        Whether this writer replaces one that died.

    Attributes
    ----------
    statistics
        Counts of this writer up to now.
    """

    def __init__(
        self, directory: CxiDirectory, journal: Journal, run: str, resumed: bool = False
    ) -> None:
        self.statistics = CxiStatistics()
        self._resumed = resumed
        self._directory = directory
        self._journal = journal
        self._run = run
        self.count_elsewhere()
        self._mention_what_is_here()

    def count_file(self, path: Path, rows: Sequence[CxiRow]) -> None:
        """Count a finished file."""
        statistics = self.statistics
        without_energy = sum(not row.result.photon_energy > 0 for row in rows)
        if without_energy and not statistics.without_energy:
            log.warning("%s: events without photon energy, which CrystFEL cannot index", path)
        statistics.written += len(rows)
        statistics.truncated += sum(row.truncated for row in rows)
        statistics.without_energy += without_energy
        statistics.files.append(path)

    def count_elsewhere(self) -> None:
        """Count what other writers of the run are known to have filtered up to now."""
        here = self.statistics.filtered_here
        journals = self._directory.journals_of(self._run)
        # What this writer has filtered is on record, too.
        self.statistics.filtered = max(here, _count_filtered(self._directory, journals))
        self.statistics.filtered_elsewhere = self.statistics.filtered - here
        self.statistics.damaged_records = sum(journal.damaged for journal in journals)

    def write_balance(self, report: ConsumeReport, stages: Mapping[str, Any]) -> Path:
        """Write down what became of all that came to this writer, and the balance of its run.

        Parameters
        ----------
        report
            Of this writer.
        stages
            What else belongs in the run's balance, ``{prefix}_balance.json``. ``files`` is added:
            the reports of all writers that the run had up to now, together.

        Returns
        -------
        pathlib.Path
            The run's balance. If a later run has taken the plain name, it is one with the run's
            name in it.

        Raises
        ------
        OSError
            If one of them cannot be written.
        """
        self._journal.append({"balance": json.loads(json.dumps(asdict(report), default=str))})
        self._journal.close()
        plain = self._directory.path / f"{self._directory.prefix}_balance.json"
        written: tuple[Path, dict[str, Any]] | None = None
        while True:
            # Another writer may end at the same time, or a later run begin: the last one to write
            # checks again.
            self._directory.look_again()
            if is_displaced(plain.parent, self._run):
                path = with_run(plain, self._run)
            else:
                path = plain
                if (other := _run_of(plain)) != self._run:
                    keep_under_run_name(plain, other)
            balance = _balance_of(self._directory, self._run)
            report.run_files = list(self._directory.files_of(self._run))
            if (path, balance) == written:
                return path
            of_all = {"run": self._run, "stages": {**stages, "files": balance["files"]}}
            write_balance(path, {**of_all, "writers": balance["writers"]}, keep_earlier=False)
            written = path, balance

    def _mention_what_is_here(self) -> None:
        directory = self._directory
        files = directory.files_of()
        ours = directory.files_of(self._run)
        others = sum(s.num_events for path, s in files.items() if path not in ours)
        if others:
            log.warning(
                "%s: %d events of other runs are here, in %d files. They stay as they are; the "
                "lists and the balance of this run leave them out",
                *(directory.path, others, len(files) - len(ours)),
            )
        if ours:
            log.log(
                logging.INFO if self._resumed else logging.WARNING,
                "%s: %d events of this run are here already, in %d files. None is written again; "
                "the lists and the balance name them, too",
                *(directory.path, sum(s.num_events for s in ours.values()), len(ours)),
            )


def _run_of(path: Path) -> str | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    run = found.get("run") if isinstance(found, dict) else None
    return run if isinstance(run, str) else None


def _balance_of(directory: CxiDirectory, run: str) -> dict[str, Any]:
    """Return the balances of a run's writers: the total, and each by name.

    A writer without a balance was killed or still works: the events it has settled are known from
    its files and its journal, and count as taken by it.
    """
    journals = directory.journals_of(run)
    files = directory.files_of(run)
    writers: dict[str, dict[str, Any] | None] = dict.fromkeys(
        [summary.writer for summary in files.values()]
    )
    for journal in journals:
        if journal.writer is not None:
            writers[journal.writer] = journal.balance or writers.get(journal.writer)
    together = ConsumeReport()
    for writer, balance in writers.items():
        if balance is None:
            of_writer = {path: s for path, s in files.items() if s.writer == writer}
            filtered = _count_filtered(directory, [j for j in journals if j.writer == writer])
            balance = asdict(_of_dead(of_writer, filtered))
        _add(together, balance)
    together.cxi.damaged_records = sum(journal.damaged for journal in journals)
    once = _count_filtered(directory, journals)
    # Two writers may have filtered one event, if the first died before it could acknowledge it.
    together.cxi.duplicates += together.cxi.filtered - once
    together.cxi.filtered = once
    ended = [balance for balance in writers.values() if balance is not None]
    together.interrupted = all(balance["interrupted"] for balance in ended)
    together.problem = "; ".join(filter(None, (balance["problem"] for balance in ended))) or None
    together.cxi.files.sort()
    together.run_files = list(files)
    return {"files": asdict(together), "writers": writers}


def _of_dead(files: Mapping[Path, CxiSummary], filtered: int) -> ConsumeReport:
    written = sum(summary.num_events for summary in files.values())
    statistics = CxiStatistics(
        taken=written + filtered,
        written=written,
        filtered=filtered,
        truncated=sum(summary.truncated for summary in files.values()),
        without_energy=sum(summary.without_energy for summary in files.values()),
        files=list(files),
    )
    return ConsumeReport(taken=statistics.taken, cxi=statistics)


def _add(together: ConsumeReport, balance: Mapping[str, Any]) -> None:
    for name in ("taken", "refused", "given_back"):
        setattr(together, name, getattr(together, name) + balance[name])
    together.failures.update(balance["failures"])
    cxi, more = together.cxi, balance["cxi"]
    for name in ("taken", "written", "duplicates", "handed_over", "truncated", "without_energy"):
        setattr(cxi, name, getattr(cxi, name) + more[name])
    cxi.filtered += more["filtered"] - more["filtered_elsewhere"]
    cxi.files += [Path(file) for file in more["files"]]


def _count_filtered(directory: CxiDirectory, journals: Iterable[JournalContents]) -> int:
    """Return how many events are filtered according to journals, and in no finished file."""
    everything = KeySet()
    everything.update(directory.known)
    for journal in journals:
        everything.update(journal.filtered)
    return len(everything) - len(directory.known)
