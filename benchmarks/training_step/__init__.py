"""What bench_training_step.py compares: the two sides, their agreement, their FLOPs, their memory."""
