"""Whichever is imported first, transformers knows our folders; and neither drags the other in."""

import subprocess
import sys

import pytest

TABLES = "from transformers.quantizers import auto"
KNOWS = (
    "assert 'dit_qat' in auto.AUTO_QUANTIZER_MAPPING; "
    "assert 'dit_qat' in auto.AUTO_QUANTIZATION_CONFIG_MAPPING"
)
LIGHT = "import sys; assert 'transformers' not in sys.modules"


@pytest.mark.parametrize(
    "code",
    [
        f"import dit_qat.llm; {LIGHT}; {TABLES}; {KNOWS}",
        f"{TABLES}; import dit_qat.llm; {KNOWS}; import importlib; importlib.reload(dit_qat.llm)",
        "from dit_qat import load_quantized; import sys; assert 'dit_qat.llm' not in sys.modules",
    ],
)
def test_the_order_of_imports_does_not_matter(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
