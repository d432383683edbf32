"""Tools to test against: the oracle, tiny models of real classes, checkpoints on disk. Importable by users."""
