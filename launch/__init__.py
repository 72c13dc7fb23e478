"""What happens around a training job: starting it."""

import os

from launch.noise import leave_out_noise

# Ranks on one CPU share its cores: an OpenMP thread that spins while it waits takes the core from one that works, and
# small models run many times slower. Read when torch is first imported, so a script imports this package before torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

leave_out_noise()
