"""Fine-tuning of mixture-of-experts models with a loss that knows the role of every span."""
