"""What a checkpoint is made of, and what a bundle of it would weigh."""
