"""Checkpoints from one format to another, with the difference measured before a file is named."""

from dit_qat.dit.convert.checkpoint import Conversion, convert_checkpoint
from dit_qat.dit.convert.difference import Difference
from dit_qat.dit.convert.formats import CheckpointFormat

__all__ = ["CheckpointFormat", "Conversion", "Difference", "convert_checkpoint"]
