"""Applications over the core, one folder a platform. They know the core; the core does not know them."""
