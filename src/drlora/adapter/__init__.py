"""Rows on experts: the pools, the layers that read them, and the PEFT method that puts them in."""
