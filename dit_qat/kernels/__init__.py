"""Operators behind ``torch.library``, each with a pure-torch twin."""
