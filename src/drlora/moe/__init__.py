"""The frozen experts of a model: where its blocks are, and how their families lie in memory."""
