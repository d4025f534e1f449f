"""Benchmarks: `foveate bench ops` times operators, `foveate bench codecs` measures rate and distortion of codecs.

Operators: `case` says what is timed and how, `ops` lists them, `report` writes what was found. Jobs: `codecs` measures,
`frontier` writes quality against cost.
"""
