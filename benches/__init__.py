"""What the ops cost, beside plain copies and beside the same work done by others.

`python -m benches` measures, `benches/table.py` writes it up, `pytest benches --benchmark-only` times the same cases one by one.

Conventions, the same for every provider:

* All cases of a scenario (a shape, dtype, data and mask) run in one process, in rounds, each round in a random order of its own, so that a
  slow minute of the machine falls on everybody alike. Medians are compared; raw samples are kept.
* `copy_` and `clone()` of the logits take part in those rounds. Copy bandwidth is 2 · bytes / time of `copy_`.
* A call is timed as its user makes it, Python included. What it needs beforehand (fresh logits for a gradient in place, the forward of a
  backward) is not timed, nor are compilation and the first call.
* Before every call caches are filled with other memory: on a GPU by a write, on a CPU by a read (where the logits are too large for the
  caches; smaller ones are measured hot, many calls to a sample).
* Bytes are those that the op cannot do without: the rows that count are read once, a gradient is written once.
* Errors are against float64, on up to 16 rows: the largest difference for statistics, ‖Δ‖/‖g‖ for gradients.
"""
