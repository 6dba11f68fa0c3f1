"""The paper's findings on models small enough to repeat them: one file a claim, one cached matrix of runs, three seeds each.

`make paper` (`python -m experiments`) makes the runs that are missing, judges every claim by the rule in its file and writes
docs/paper.md. `--only NAME` takes one claim, `--fresh` makes all runs anew, `--steps N` tries the whole out with runs of N steps.
"""
