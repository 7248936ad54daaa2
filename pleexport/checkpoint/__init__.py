"""Open trained checkpoints, and match their tensors with a model's."""
