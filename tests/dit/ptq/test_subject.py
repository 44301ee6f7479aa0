import json
from pathlib import Path
from typing import Any

import pytest
from diffusers import DiffusionPipeline

from dit_qat.dit.ptq import subject
from dit_qat.dit.ptq.subject import open_subject


def test_what_diffusers_cannot_build_is_one_line_with_the_packages_that_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = {"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))

    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("`low_cpu_mem_usage` cannot be False\nwhen something.")

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", refuse)
    monkeypatch.setattr(subject, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="cannot be False when something") as caught:
        open_subject(str(tmp_path))
    assert "transformers, accelerate (pip install dit-qat[pipelines])" in str(caught.value)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(subject, "find_spec", lambda name: object())
    with pytest.raises(ValueError, match=r"when something\.\)$"):
        open_subject(str(tmp_path))
