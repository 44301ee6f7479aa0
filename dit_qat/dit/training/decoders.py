"""The autoencoder that shows, during training, what a network of latents draws."""

import pytorch_lightning as pl

from dit_qat.dit.data import Latents
from dit_qat.dit.models import DiT
from dit_qat.dit.models.autoencoder import Autoencoder, check_channels, load_autoencoder

__all__ = ["load_decoder"]


def load_decoder(vae: str, network: DiT, trainer: pl.Trainer) -> Autoencoder:
    """Load an autoencoder that decodes what a network draws.

    Args:
        vae: See ``load_autoencoder``, whose errors this raises.
        network: In training.
        trainer: Of the run, with the latents that the network learns.

    Raises:
        ValueError: if it has another number of channels than the network, or scales latents
            otherwise than those in training (other weights are no error: published autoencoders
            share an encoder).
    """
    decoder = load_autoencoder(vae)
    check_channels(decoder.space, network)
    data = trainer.datamodule  # type: ignore[attr-defined]
    if isinstance(data, Latents):
        theirs, ours = data.cache.space, decoder.space
        scales = [(space.scaling_factor, space.shift_factor) for space in (theirs, ours)]
        if scales[0] != scales[1]:
            raise ValueError(
                f"the autoencoder {vae} has scaling and shift {scales[1]}, the latents in "
                f"{data.root} were made with {scales[0]} of {theirs.source}; name that one"
            )
    return decoder
