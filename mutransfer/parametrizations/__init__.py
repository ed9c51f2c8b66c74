"""Parametrizations: the structure of a table of scaling exponents, and the tables of µP, SP, spectral and CompleteP."""
