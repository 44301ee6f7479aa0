"""AdaTSQ: temporal Fisher weights, and activation bits by timestep and layer."""

from dit_qat.dit.methods.adatsq.method import AdaTSQ, AdaTSQConfig
from dit_qat.dit.methods.adatsq.policy import Policy
from dit_qat.dit.methods.adatsq.weights import WeightSettings

__all__ = ["AdaTSQ", "AdaTSQConfig", "Policy", "WeightSettings"]
