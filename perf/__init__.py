"""Benchmarks of triton_bn on a GPU: cases, providers, the runner, the plots, and what was measured.

Not part of the installed package: ``python -m perf`` from the repository's top level.
"""
