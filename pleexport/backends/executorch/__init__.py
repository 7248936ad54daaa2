"""The ExecuTorch backend."""
