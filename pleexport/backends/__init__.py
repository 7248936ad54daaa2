"""The runtime formats that are written and run, a folder each."""
