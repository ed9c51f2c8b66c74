"""Interoperability: models and base shapes of mup, and recorder callbacks for Lightning and transformers."""
