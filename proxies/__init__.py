"""Proxy models, their data, and the training loop that all runs share."""
