"""Triton's kernels of a GPU, each for what torch would take several launches and passes over memory for. On a CPU
tests/fused runs them by Triton's interpreter, against what computes the same there."""

IN_ONE_LAUNCH = {"cuda"}  # devices on which they run
