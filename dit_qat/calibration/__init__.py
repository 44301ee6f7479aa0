"""Calibration of any model block by block: recorded calls, statistics, a quantized prefix.

Nothing here knows a diffusion transformer or a language model: a model is something that is
called, and blocks are modules whose inputs are followed by the identity of tensors.
"""

from dit_qat.calibration.blocks import BlockChain, find_blocks
from dit_qat.calibration.calls import Call, CallStore
from dit_qat.calibration.capture import evaluating, record_calls
from dit_qat.calibration.driver import Prefix, drive
from dit_qat.calibration.memory import MemoryPlan
from dit_qat.calibration.state import ResumeState, fingerprint, register_codec
from dit_qat.calibration.statistics import LinearStatistics, Needs
from dit_qat.calibration.view import BlockView, swapped

__all__ = [
    "BlockChain",
    "BlockView",
    "Call",
    "CallStore",
    "LinearStatistics",
    "MemoryPlan",
    "Needs",
    "Prefix",
    "ResumeState",
    "drive",
    "evaluating",
    "find_blocks",
    "fingerprint",
    "record_calls",
    "register_codec",
    "swapped",
]
