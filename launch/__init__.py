"""Commands that prepare a training job: its plan, the checks of its nodes, and its W&B workspace."""

import train  # noqa: F401  # which makes libraries quiet, before they are imported
