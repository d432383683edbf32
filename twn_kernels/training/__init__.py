"""Training of a TWN model: adapters, queries and gate on a frozen backbone."""
