"""The tool behind the table of sizes, on a network that takes no time."""

import json
import sys

import packed_size
import pytest

from dit_qat.dit.models import DiT
from dit_qat.export.manifest import CONFIG_FILE, TENSOR_FILE

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_every_number_is_of_a_real_file(tmp_path, monkeypatch):
    sizes = {"input_size": 4, "in_channels": 1, "hidden_size": 32, "depth": 1, "num_heads": 2}
    monkeypatch.setattr(packed_size, "dit_variant", lambda name: DiT(**sizes, num_classes=3))
    results = json.loads(json.dumps(packed_size.run("tiny", 2, "ternary_1.6", 1, tmp_path)))
    floats = sum(p.numel() for p in DiT(**sizes, num_classes=3).parameters())
    for branch, found in results["branch"].items():
        files = {n: (tmp_path / branch / n).stat().st_size for n in (CONFIG_FILE, TENSOR_FILE)}
        assert found["files"] == files
        assert found["float_parameters"] == floats
        ratio = found["times_smaller_than_float32_on_disk"]
        assert ratio == pytest.approx(4 * floats / sum(files.values()))
        assert found["seconds"]["load_cold"] > 0
        assert set(found["load_over_read"]) == {"cold", "warm"}
        first = found["first_load_of_a_process"]
        assert first["peak_bytes"] >= first["held_bytes"]
        assert first["tensor_bytes"] <= found["measured"]["resident_bytes"]
        assert found["write_peak_bytes_beside_the_model"] >= 0
    one, other = (results["branch"][name]["measured"] for name in ("float32", "bfloat16"))
    assert other["disk_bytes"] < one["disk_bytes"]
    assert other["resident_bytes"] < one["resident_bytes"]
