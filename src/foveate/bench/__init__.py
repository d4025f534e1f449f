"""Benchmarks: `foveate bench ops` times every operator's fast path against its reference and against others' ways.

`case` says what is timed and how, `ops` lists the operators, `report` writes what was found.
"""
