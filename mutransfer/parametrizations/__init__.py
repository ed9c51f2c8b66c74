"""Parametrizations: what a table of scaling exponents is, and µP, SP, spectral and CompleteP as such tables."""
