"""`make gpu-check`: is everything right on this GPU, and how fast is it. One command, nothing to download, about nine minutes.

For a machine with an NVIDIA GPU, nvcc, a CUDA build of torch 2.11 or newer and Triton; pytest is needed too, pytest-xdist is used where it
is, and so are the peers that can be imported. Wheels in the folder `wheels/` (or `--wheels FOLDER`) are put on the path first.

The stages, in this order, each a process of its own that may take what is left of the time in proportion to its weight:

    build      csrc, for this GPU alone
    rates      what this GPU copies and multiplies at this moment: the floors
    tests      the tests of the ops, on the device: every backend, 2^31 logits, graphs, streams, waits, a hundred random shapes
    sanitized  every CUDA kernel under compute-sanitizer
    ops        the ops on logits beside copies and peers
    linear     the ops on hidden states beside the bare products and peers
    grid       25 shapes: nobody ahead, no cliff
    trainer    a base model is made and trained here; the head fused and plain
    counters   what ncu counts in our kernels

After each stage gpu-check-<gpu>-<date>-<commit>.json is written, so that a run that is killed leaves what it had. Results of `ops`,
`linear` and `grid` are files of their own beside it, which the README's tables are made from. The exit status is 1 where a result is wrong,
2 where something could not be checked, and 0 otherwise: speeds are reported and fail nothing.
"""

RIGHT, WRONG, UNCHECKED = 0, 1, 2
FOUND_WRONG = 10  # exit status of a stage that has seen a wrong result; 1 is that of any exception, pytest has some more
