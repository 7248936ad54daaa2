"""From a checkpoint to a sealed bundle."""
