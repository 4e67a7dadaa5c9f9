"""Device code of Autonomy-of-Experts and plain mixtures of experts."""
