"""Plain implementations of models that no library has, to compare bundles with."""
