"""The runtime formats that are written and run."""
