"""Adapters as PEFT saves them, merged into a checkpoint while its tensors are read."""
