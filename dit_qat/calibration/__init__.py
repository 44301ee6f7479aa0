"""Calibration of any model block by block: recorded calls, statistics, a quantized prefix.

Nothing here knows a diffusion transformer or a language model: a model is something that is
called, and blocks are modules whose inputs are followed by the identity of tensors.
"""

from dit_qat.calibration.blocks import BlockChain, find_blocks
from dit_qat.calibration.calls import Call, CallStore
from dit_qat.calibration.capture import evaluating, record_calls
from dit_qat.calibration.driver import Prefix, drive
from dit_qat.calibration.engine import RunResult, run_method
from dit_qat.calibration.memory import MemoryPlan
from dit_qat.calibration.method import BlockMethod, Method, Run
from dit_qat.calibration.state import ResumeState, fingerprint, register_codec, remove_state
from dit_qat.calibration.statistics import LinearStatistics, Needs
from dit_qat.calibration.table import LayerRow, average_bits, bits_table
from dit_qat.calibration.target import Target
from dit_qat.calibration.view import BlockView, swapped

__all__ = [
    "BlockChain",
    "BlockMethod",
    "BlockView",
    "Call",
    "CallStore",
    "LayerRow",
    "LinearStatistics",
    "MemoryPlan",
    "Method",
    "Needs",
    "Prefix",
    "ResumeState",
    "Run",
    "RunResult",
    "Target",
    "average_bits",
    "bits_table",
    "drive",
    "evaluating",
    "find_blocks",
    "fingerprint",
    "record_calls",
    "register_codec",
    "remove_state",
    "run_method",
    "swapped",
]
