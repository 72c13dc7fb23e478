"""What happens around a training job: starting it."""
