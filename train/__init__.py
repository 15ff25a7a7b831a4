"""Training: packs and exports in, checkpoints out. Knows the core, never the doors."""
