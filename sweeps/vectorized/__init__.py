"""Fused sweeps: trials of equal shape as one program, because their hyperparameters change no shape."""
