"""Exports: the target settings in the form a training framework reads."""
