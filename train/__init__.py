"""Fine-tuning of mixture-of-experts models with a loss that knows the role of every span."""

import launch  # noqa: F401  # which makes libraries quiet, before they are imported
