"""Fine-tuning of mixture-of-experts models with a loss that knows the role of every span."""

import os

from train.runtime.noise import leave_out_noise

# Ranks on one CPU share its cores. An OpenMP thread that spins while it waits takes a core from a thread that has work,
# and small models run many times slower. torch reads the variable when it is first imported, so a script must import
# this package before torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

leave_out_noise()
