"""Proxies: small models, data, and the one training loop."""
