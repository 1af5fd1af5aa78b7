"""Files that other people wrote, read without trusting them: annotations, pictures, checkpoints."""
