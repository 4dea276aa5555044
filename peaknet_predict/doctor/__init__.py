"""Checks of what a run needs, with what to do about each finding."""

from __future__ import annotations

from peaknet_predict.doctor.command import doctor

__all__ = ["doctor"]
