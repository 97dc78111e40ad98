"""Measurements of speed and size, each a module to run: ``python -m experiments.benchmarks.kernels``.

Timings on a shared machine drift, so what is compared is measured in turns within one run, calls during
which other processes worked are made again, and what is reported is the ratio of the medians.
"""
