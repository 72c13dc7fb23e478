"""Triton kernels for a GPU. Each replaces several kernel launches and passes over memory in torch.

On a CPU, tests/fused runs them in Triton's interpreter and compares them with the torch code that computes the same.
"""

IN_ONE_LAUNCH = {"cuda"}  # types of the devices on which the kernels run
