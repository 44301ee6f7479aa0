"""Images from a diffusion transformer, each a function of its index and the seed alone.

``sampler`` draws them, ``store`` keeps them on disk, ``record`` says how they were made, and
``run`` shares the work among processes and continues after a kill. The last is imported by its own
name: it writes image files, whose package rounds by :func:`to_uint8`.
"""

from dit_qat.dit.sampling.sampler import SamplerConfig, sample_images, to_uint8
from dit_qat.dit.sampling.store import Column, ShardStore, write_npz

__all__ = ["Column", "SamplerConfig", "ShardStore", "sample_images", "to_uint8", "write_npz"]
