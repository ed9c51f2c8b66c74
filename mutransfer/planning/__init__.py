"""Plans: per-parameter settings from a model family, a scale and a recipe, and the settings of the target run."""
