"""Quantizers that others wrote, each run by its own script in an environment of its own."""
