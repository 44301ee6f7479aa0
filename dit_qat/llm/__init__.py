"""Language models in 0.55 to 3 bits: models, data, methods, evaluation, storage.

Importing this lets transformers read packed folders:
``AutoModelForCausalLM.from_pretrained(folder)``.
"""

from dit_qat.llm.hf.registration import register_when_imported
from dit_qat.llm.packed import register_causal_lm

register_causal_lm()
register_when_imported()
