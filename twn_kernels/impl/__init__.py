"""Implementations of the core contract; siblings that never import one another."""
