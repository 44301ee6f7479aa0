import math

import pytest

from dit_qat.export.extras import import_extra


def test_what_is_installed_is_imported():
    assert import_extra("math", "llm") is math


def test_what_is_not_installed_names_the_extra():
    with pytest.raises(
        ValueError, match=r"no_such_module is needed .* pip install 'dit-qat\[data\]'"
    ):
        import_extra("no_such_module", "data")
