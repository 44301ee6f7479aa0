"""Packed folders as transformers reads and writes them."""
