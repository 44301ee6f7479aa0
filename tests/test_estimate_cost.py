"""The estimate of memory and time, against what is known of a small network."""

import argparse

import pytest
from estimate_cost import bytes_per_block, estimate, forward_flops, launched, network_of

SIZES = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 1,
    "hidden_size": 64,
    "depth": 3,
    "num_heads": 2,
    "num_classes": 10,
}
NETWORK = {"class_path": "dit_qat.dit.models.DiT", "init_args": SIZES}
ROBUQ = {"class_path": "dit_qat.dit.methods.RobuQ", "init_args": {"rank": 4}}


def config(**model):
    return {
        "model": {"network": NETWORK, **model},
        "data": {"init_args": {"batch_size": 16}},
        "trainer": {"max_steps": 1000},
    }


def options(**given):
    return argparse.Namespace(
        **({"gpus": 1, "tflops": 1.0, "qat_ratio": 1.5, "launch_us": 0.0} | given)
    )


def test_a_block_costs_the_flops_of_its_products():
    def flops(depth):
        network = {"init_args": SIZES | {"depth": depth}}
        return forward_flops({"network": network})

    tokens, width = 16, 64
    linears = 12 * width**2 * tokens + 6 * width**2
    attention = 2 * tokens**2 * width
    assert flops(3) - flops(2) == 2 * (linears + attention)


def test_time_and_states_follow_from_the_parts():
    plain = estimate(config(), options())
    quantized = estimate(config(method=ROBUQ), options())
    parameters = sum(p.numel() for p in network_of(config()["model"], False, "cpu").parameters())
    fixed = 64 * 16  # the position embedding is not trained
    assert plain["parameters"] == parameters - fixed
    assert plain["states_gib"] * 2**30 == 20 * plain["parameters"]
    assert plain["checkpoint_gb"] * 1e9 == pytest.approx(16 * plain["parameters"])
    # Weights, gradient, two moments and average; the distilled one has a teacher besides.
    assert quantized["states_gib"] * 2**30 == 24 * quantized["parameters"]
    assert quantized["parameters"] > plain["parameters"]
    assert quantized["hours"] == pytest.approx(plain["hours"] * (3 * 1.5 + 1) / 3)


def test_more_gpus_share_images_and_time():
    one, four = (estimate(config(), options(gpus=gpus)) for gpus in (1, 4))
    assert four["images_per_gpu"] == one["images_per_gpu"] / 4
    assert four["hours"] == pytest.approx(one["hours"] / 4)


def test_checkpointing_keeps_less_and_computes_a_forward_more():
    plain, saving = (estimate(config(gradient_checkpointing=c), options()) for c in (False, True))
    assert saving["activations_gib"] < plain["activations_gib"]
    assert saving["hours"] == pytest.approx(plain["hours"] * 4 / 3)


def test_a_step_takes_at_least_its_launches():
    one, eight = (estimate(config(method=ROBUQ), options(gpus=n, launch_us=5.0)) for n in (1, 8))
    assert one["launch_bound"]
    assert one["seconds_per_step"] == pytest.approx(one["launches_per_step"] * 5e-6)
    assert eight["hours"] == one["hours"]  # more GPUs do not launch faster
    assert not estimate(config(method=ROBUQ), options())["launch_bound"]
    saving = config(method=ROBUQ, gradient_checkpointing=True)
    assert estimate(saving, options())["launches_per_step"] > one["launches_per_step"]


def test_launches_are_those_of_the_layers():
    forward, backward = launched(config()["model"], quantized=False)
    blocks = SIZES["depth"]
    # A block has seven products at least: five linear layers, and two or one fused in attention.
    assert forward > 6 * blocks
    assert backward > forward
    assert launched(config(method=ROBUQ)["model"], quantized=True)[0] > 3 * forward


def test_blocks_keep_bytes_per_image():
    per_image, _ = bytes_per_block(config()["model"])
    # At least the inputs of four linear layers, in bfloat16: 64, 64, 64 and 256 wide.
    assert per_image >= 16 * (3 * 64 + 256) * 2
