"""What works here, tried rather than looked up, and how to mend what does not: `drlora doctor`."""
