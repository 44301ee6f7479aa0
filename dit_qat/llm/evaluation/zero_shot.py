"""Zero-shot tasks on the live model, by EleutherAI's evaluation harness."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from dit_qat.calibration.capture import evaluating
from dit_qat.export.extras import import_extra

__all__ = ["SEVEN_TASKS", "average", "known_tasks", "zero_shot"]

SEVEN_TASKS = (
    "piqa",
    "arc_easy",
    "arc_challenge",
    "hellaswag",
    "winogrande",
    "openbookqa",
    "boolq",
)
"""Those of ARB-LLM, PBS2P and PT2-LLM; D2Quant has RTE in place of BoolQ."""

_MEASURES = ("acc", "acc_norm")


def zero_shot(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str] = SEVEN_TASKS,
    *,
    limit: int | None = None,
    batch: int = 8,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Accuracy of a model in multiple-choice tasks without examples.

    Args:
        model: A causal language model of Hugging Face, with or without quantized layers.
        tokenizer: Its tokenizer.
        tasks: Names of tasks, or of groups with a mean of their own (mmlu), that the harness knows.
        limit: Questions of each task; None: all.
        batch: Sequences per call.
        seed: Of all that the harness draws.

    Returns:
        By task "acc" and, where the task has it, "acc_norm" (by length in bytes), in percent.
        Papers report either, so that their averages do not compare.

    Raises:
        ValueError: if the harness is not installed, there is no task, or one is unknown
            or has no accuracy.
    """
    manager = known_tasks(tasks)
    harness = import_extra("lm_eval", "llm")
    language_model = import_extra("lm_eval.models.huggingface", "llm").HFLM
    with evaluating(model):
        told = harness.simple_evaluate(
            model=language_model(pretrained=model, tokenizer=tokenizer, batch_size=batch),
            tasks=list(tasks),
            num_fewshot=0,
            limit=limit,
            log_samples=False,  # which would keep every question in memory
            task_manager=manager,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    return {task: _percent(task, told["results"].get(task, {})) for task in tasks}


def average(results: Mapping[str, Mapping[str, float]], measure: str = "acc") -> float:
    """Mean over tasks, in percent; of tasks without ``measure``, their "acc".

    Raises:
        ValueError: if there are no results, or the measure is unknown.
    """
    if measure not in _MEASURES:
        raise ValueError(f"measure {measure!r} is unknown; use one of {_MEASURES}")
    if not results:
        raise ValueError("there are no results to average")
    return sum(found.get(measure, found["acc"]) for found in results.values()) / len(results)


def known_tasks(tasks: Sequence[str]) -> Any:
    """Make sure that the harness can run tasks; returns its list of all that there are.

    Raises:
        ValueError: if the harness is not installed, there is no task, or one is unknown.
    """
    if not tasks:
        raise ValueError(f"there are no tasks; name some, such as {', '.join(SEVEN_TASKS)}")
    import_extra("lm_eval", "llm")  # first, so that it is what a message names
    manager = import_extra("lm_eval.tasks", "llm").TaskManager()
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise ValueError(
            f"lm-eval knows no {', '.join(unknown)}; 'lm-eval ls tasks' lists what it knows"
        )
    tags = [task for task in tasks if task in manager.all_tags]
    if tags:
        raise ValueError(
            f"{', '.join(tags)} are tags of lm-eval, which have no result of their own; name the "
            "tasks, as 'lm-eval ls subtasks' lists them"
        )
    return manager


def _percent(task: str, found: Mapping[str, Any]) -> dict[str, float]:
    """The harness keys its numbers by measure and filter."""
    kept = {m: 100 * float(found[f"{m},none"]) for m in _MEASURES if f"{m},none" in found}
    if "acc" not in kept:
        raise ValueError(
            f"task {task} has no accuracy (it measures {', '.join(found) or 'none'}); leave it out"
        )
    return kept
