"""From a family, a scale and a recipe to a plan: the settings of every parameter, and the settings of the target run."""
