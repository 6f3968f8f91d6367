"""The parts of bench_training_step.py: the two sides, their agreement, FLOPs and memory."""
