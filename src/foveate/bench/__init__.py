"""Benchmarks: `foveate bench ops` times operators; `bench codecs` and `bench upscale` measure quality against cost.

Operators: `case` says what is timed and how, `ops` lists them, `report` writes what was found. Jobs: `codecs` and
`upscale` measure, `frontier` writes table and figure.
"""
