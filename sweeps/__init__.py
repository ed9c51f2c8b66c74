"""Sweeps: Optuna studies over proxies, and learning-rate basins across widths."""
