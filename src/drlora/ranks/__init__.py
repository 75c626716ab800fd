"""Who gets ranks: signals, schedule, allocation, and the events at which rows change hands."""
