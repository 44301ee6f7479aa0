"""How good a language model is: perplexity, zero-shot tasks."""

from dit_qat.llm.evaluation.perplexity import perplexity, window_losses
from dit_qat.llm.evaluation.zero_shot import SEVEN_TASKS, average, known_tasks, zero_shot

__all__ = ["SEVEN_TASKS", "average", "known_tasks", "perplexity", "window_losses", "zero_shot"]
