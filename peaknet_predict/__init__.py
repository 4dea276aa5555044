"""Streaming Bragg peak finding with PeakNet."""

__version__ = "0.2.0"
"""The one place: package metadata, ``--version``, logs, CXI and weight files take it from here."""
