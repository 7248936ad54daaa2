"""From a model's dense part to a file that a runtime executes."""
