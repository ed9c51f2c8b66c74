"""Vectorized sweeps: train trials of equal shape as one program, since their hyperparameters do not change any shapes."""
