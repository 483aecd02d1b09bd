"""Benchmarks: how long the functions of the contract take, on inputs whose results are checked.

`workloads` says what is timed, `tensors` draws it, `tasks` prepares calls, `sampled` judges their
results, `watches` measure, `trust` doubts, `rounds` interleaves, `counts` and `ceilings` give the
roofline, `record` stores, `gate` compares, `table` and `plots` show. `docs/benchmarks.md` explains.
"""
