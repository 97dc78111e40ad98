"""Other ways of doing the same, written as their authors show them, for the benchmarks."""

from __future__ import annotations
