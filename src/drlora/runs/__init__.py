"""One run, from a recipe to a directory: train, measure, export, look into."""
