"""Score adapters and compare ways to make them.

In: adapters, generators, tasks. Out: perplexity, bits per character, accuracy, mAP, and ``comparison.json``.
"""

from lora_factory._lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "accuracy": "task_accuracy completion_accuracy choice_accuracy",
        "baselines": "uniform_soup greedy_soup Retrieval PcaRidge",
        "comparison": "compare",
        "cond_p_diff": "CondPDiff",
        "detection": "Detection detect mean_average_precision score_detections",
        "fold": "Fold",
        "perplexity": "TextScore evaluate_adapters evaluate_texts score_examples score_task",
    },
)
