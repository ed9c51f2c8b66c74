"""How optimizers scale: which of them have a rule, what it reads from a table, and Muon with AdamW as one optimizer."""
