"""What runs bundles: no torch, and nothing that builds."""
