"""Where images come from: sources, prompts, class names and class trees."""

from robustvlm.core.framing import to_pixels
from robustvlm.data.source import UNKNOWN, DataSource, Sample, Unreadable, select
from robustvlm.data.specs import open_data
from robustvlm.data.trees import Forest, Tree, load_tree

__all__ = [
    "UNKNOWN", "DataSource", "Forest", "Sample", "Tree", "Unreadable", "load_tree", "open_data", "select", "to_pixels",
]  # fmt: skip
