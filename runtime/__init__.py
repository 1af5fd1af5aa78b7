"""What every program needs around the model: errors, files, signals, processes, data loading."""
