"""Fine-tuning of mixture-of-experts models with a loss that knows the role of every span."""

import os

# Ranks on one CPU share its cores: an OpenMP thread that spins while it waits takes the core from one that works, and
# small models run a hundred times slower. Read when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
