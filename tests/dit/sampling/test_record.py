import json
import re
from dataclasses import replace

import pytest
import torch

from dit_qat.dit.methods import RobuQ
from dit_qat.dit.sampling.record import (
    RECORD,
    RESULTS,
    check_record,
    claim_record,
    differences,
    environment,
    network_sha256,
)
from dit_qat.layers import QuantConfig, quantize_

SETTINGS = {"num_samples": 10, "sampler": {"steps": 2, "seed": 0}, "latent_space": None}


def test_a_new_folder_gets_its_record_and_an_equal_run_goes_on(tmp_path):
    out = tmp_path / "deep" / "out"
    assert check_record(out, SETTINGS, overwrite=False) is False
    assert not out.exists()
    assert claim_record(out, SETTINGS, overwrite=False) is False
    assert json.loads((out / RECORD).read_text()) == SETTINGS
    (out / "shards").mkdir()
    assert claim_record(out, SETTINGS, overwrite=False) is True
    assert claim_record(out, {**SETTINGS, "source": "moved"}, overwrite=False) is True
    assert (out / "shards").is_dir()
    assert claim_record(out, SETTINGS, overwrite=True) is False
    assert not (out / "shards").exists()


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"num_samples": 11}, "num_samples: 10 there, 11 here"),
        ({"sampler": {"steps": 3, "seed": 0}}, "sampler.steps: 2 there, 3 here"),
        ({"latent_space": {"sha256": "ab"}}, 'latent_space: null there, {"sha256": "ab"} here'),
        ({"threads": 2}, "threads: null there, 2 here"),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path, changed, named):
    claim_record(tmp_path, SETTINGS, overwrite=False)
    before = (tmp_path / RECORD).read_bytes()
    with pytest.raises(FileExistsError, match=re.escape(named)) as caught:
        claim_record(tmp_path, SETTINGS | changed, overwrite=False)
    assert "--overwrite true" in str(caught.value)
    assert (tmp_path / RECORD).read_bytes() == before


@pytest.mark.parametrize("name", [name for name in RESULTS if name != RECORD])
def test_results_without_a_record_are_somebody_elses(tmp_path, name):
    (tmp_path / name).write_text("precious")
    with pytest.raises(FileExistsError, match=re.escape(name)):
        claim_record(tmp_path, SETTINGS, overwrite=False)
    assert (tmp_path / name).read_text() == "precious"


def test_a_damaged_record_is_named(tmp_path):
    (tmp_path / RECORD).write_text("{")
    with pytest.raises(ValueError, match=r"sampling\.json is damaged"):
        check_record(tmp_path, SETTINGS, overwrite=False)
    assert check_record(tmp_path, SETTINGS, overwrite=True) is False


def test_many_differences_are_counted():
    one, other = ({f"key{i}": (i, side) for i in range(9)} for side in "ab")
    found = differences(json.loads(json.dumps(one)), json.loads(json.dumps(other)), "old", "new")
    assert found.startswith('key0: [0, "a"] old, [0, "b"] new; key1')
    assert found.endswith("and 4 more")
    assert differences(one, one, "old", "new") == ""
    assert differences(None, one, "old", "new")


def test_the_environment_says_what_rounds(monkeypatch):
    found = environment(torch.device("cpu"))
    assert found["device"] == "cpu"
    assert found["threads"] == torch.get_num_threads()
    assert found["versions"]["torch"] == torch.__version__
    assert json.loads(json.dumps(found)) == found


def test_a_network_is_known_by_values_settings_and_formats(make_network):
    float_sha = network_sha256(make_network())
    assert network_sha256(make_network()) == float_sha
    changed = make_network()
    with torch.no_grad():
        changed.final_layer.linear.bias[0] += 1e-6
    shifted = make_network(timestep_shift=1)
    assert len({float_sha, network_sha256(changed), network_sha256(shifted)}) == 3
    rules = RobuQ(rank=2, distillation=0.0).quant_config()
    one, other = (
        network_sha256(
            quantize_(make_network(), QuantConfig(replace(rules, seed=seed).rules, seed))
        )
        for seed in (0, 1)
    )
    assert len({float_sha, one, other}) == 3
