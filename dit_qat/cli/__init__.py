"""The console script ``dit-qat``: parse, call, print."""
