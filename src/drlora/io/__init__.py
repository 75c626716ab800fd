"""Files of a run and of others: how they are read, written at once or not at all, and found again."""
