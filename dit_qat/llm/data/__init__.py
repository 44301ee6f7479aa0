"""Windows of text to calibrate on and to evaluate on."""

from dit_qat.llm.data.text import encode_file
from dit_qat.llm.data.windows import calibration_windows, evaluation_windows

__all__ = ["calibration_windows", "encode_file", "evaluation_windows"]
