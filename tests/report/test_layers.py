import io

import numpy as np
import pytest
from PIL import Image

from dit_qat.calibration.table import LayerRow
from dit_qat.report.layers import block_and_kind, layer_error_plot, layer_table
from dit_qat.report.style import COLOURS


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def has_colour(png: bytes, colour: str) -> bool:
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return bool((np.abs(pixels(png).astype(int) - wanted).sum(-1) < 6).any())


def test_every_kind_of_layer_has_its_line() -> None:
    names = [f"blocks.{i}.{kind}" for i in range(3) for kind in ("attn.qkv", "mlp.fc1")]
    png = layer_error_plot(dict.fromkeys(names, 1e-3) | {"blocks.1.mlp.fc1": 0.0})
    assert has_colour(png, COLOURS[0])
    assert has_colour(png, COLOURS[1])
    assert not has_colour(png, COLOURS[2])


def test_hundreds_of_layers_take_no_more_room() -> None:
    few = {f"blocks.{i}.attn.qkv": 1e-3 for i in range(2)}
    many = {f"blocks.{i}.attn.qkv": 1e-3 for i in range(200)}
    many |= {f"single.{i}.attn.qkv": 2e-3 for i in range(200)}
    assert pixels(layer_error_plot(many)).shape == pixels(layer_error_plot(few)).shape


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("blocks.11.attn.qkv", ("blocks.11", "attn.qkv")),
        ("a.b.3.ff.net.0.proj", ("a.b.3", "ff.net.0.proj")),
        ("proj_out", ("proj_out", "proj_out")),
    ],
)
def test_a_name_is_split_behind_its_first_number(name: str, parts: tuple[str, str]) -> None:
    assert block_and_kind(name) == parts


def test_no_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="no layer errors"):
        layer_error_plot({})


def rows(count: int) -> list[LayerRow]:
    names = [f"blocks.{i // 2}.{('attn.qkv', 'mlp.fc1')[i % 2]}" for i in range(count)]
    return [LayerRow(name, 8, 16 + i, 2.0, 2.25, 16, 5, 1e-3, 40) for i, name in enumerate(names)]


def test_a_large_model_has_one_row_per_kind_of_layer() -> None:
    assert layer_table(rows(64)).count('<th scope="row">') == 64
    grouped = layer_table(rows(66))
    assert grouped.count('<th scope="row">') == 2
    assert "*.attn.qkv (33)" in grouped
    assert "16 – 80" in grouped
