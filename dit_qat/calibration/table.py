"""Bits of every quantized layer and their averages, nominal and with all side information."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from torch import nn

from dit_qat.layers.coded_linear import CodedLinear
from dit_qat.layers.int_linear import IntLinear

__all__ = ["LayerRow", "average_bits", "bits_table"]

_FLOAT_BITS = 16  # what a layer without an activation quantizer computes in, where it is served


@dataclass(frozen=True)
class LayerRow:
    """One quantized linear.

    Attributes:
        name: Full name.
        in_features: Inputs.
        out_features: Outputs.
        weight_bits: Nominal: of a code, or as the paper counts.
        effective_weight_bits: With scales, zero points, masks, transform and branch.
        activation_bits: Mean over timesteps, if they differ; 16 where the input stays float.
        tokens: Rows that it saw in calibration.
        error: Relative squared error of its output in calibration, its input being float.
        bytes: Stored.
    """

    name: str
    in_features: int
    out_features: int
    weight_bits: float
    effective_weight_bits: float
    activation_bits: float
    tokens: int
    error: float
    bytes: int

    @property
    def macs(self) -> int:
        """Multiplications on the calibration set."""
        return self.in_features * self.out_features * self.tokens

    def plain(self) -> dict[str, Any]:
        """Plain values, as for a JSON file."""
        return asdict(self)


def bits_table(
    model: nn.Module, names: Sequence[str], notes: Mapping[str, Mapping[str, Any]]
) -> list[LayerRow]:
    """One row for each of the named linears that is quantized.

    Args:
        model: Quantized.
        names: Full names.
        notes: ``tokens`` and ``error`` by full name.
    """
    rows = []
    for name in names:
        layer = model.get_submodule(name)
        if isinstance(layer, IntLinear | CodedLinear):
            note = notes.get(name, {})
            rows.append(_row(name, layer, int(note.get("tokens", 0)), float(note["error"])))
    return rows


def average_bits(rows: Sequence[LayerRow]) -> dict[str, float]:
    """Averages over layers: plain, by operations (``_by_macs``) and, for weights, by size.

    Returns:
        ``weight_bits``, ``activation_bits`` (plain means), ``weight_bits_by_macs``,
        ``activation_bits_by_macs``, ``effective_weight_bits`` (over all weights).
    """
    macs = [row.macs for row in rows]
    sizes = [row.in_features * row.out_features for row in rows]
    found = {}
    for name in ("weight_bits", "activation_bits"):
        values = [float(getattr(row, name)) for row in rows]
        found[name] = fmean(values)
        found[f"{name}_by_macs"] = fmean(values, macs) if any(macs) else found[name]
    effective = [row.effective_weight_bits for row in rows]
    return {**found, "effective_weight_bits": fmean(effective, sizes)}


def _row(name: str, layer: IntLinear | CodedLinear, tokens: int, error: float) -> LayerRow:
    activation = layer.activation_bits
    return LayerRow(
        name,
        layer.in_features,
        layer.out_features,
        layer.nominal_weight_bits,
        layer.effective_weight_bits,
        float(_FLOAT_BITS if activation is None else activation),
        tokens,
        error,
        layer.bytes_stored,
    )
