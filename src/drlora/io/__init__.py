"""Files of a run and of others: read, written at once or not at all, and found again."""
