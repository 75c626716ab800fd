"""A whole recipe for a model and data, that fits into the memory there is: `drlora plan`."""
