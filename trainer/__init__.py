"""What train.py needs around a step: flags, data, checks, checkpoints, evaluation."""
