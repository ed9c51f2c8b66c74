"""Scaling rules of optimizers: which optimizers have one and what it reads from a table; Muon with AdamW as one optimizer."""
