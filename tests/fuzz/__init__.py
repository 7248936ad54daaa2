"""Mutated checkpoints, bundles and other files, and a verdict for each."""
