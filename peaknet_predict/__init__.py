"""Streaming Bragg peak finding with PeakNet."""
