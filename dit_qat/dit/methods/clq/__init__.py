"""CLQ: cross-block calibration, orthogonal-based smoothing, cross-layer parameter search."""

from dit_qat.dit.methods.clq.method import CLQ, CLQConfig

__all__ = ["CLQ", "CLQConfig"]
