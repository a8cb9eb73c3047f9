"""Turn the result of a comparison into tables, plots and pages.

In: ``comparison.json``, as `lora_factory.evaluation.comparison.compare` returns it.
Out: Markdown, terminal tables, SVG, HTML.
"""

from lora_factory._lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "report": "markdown_tables terminal_tables html_page write_report",
        "summary": "summarise findings headroom",
    },
)
