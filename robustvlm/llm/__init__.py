"""A small client for language models behind any OpenAI-compatible endpoint: typed answers, retries, a cache, costs."""

from robustvlm.llm.client import LlmClient, Prices, Usage
from robustvlm.llm.transport import Endpoint, LlmError

__all__ = ["Endpoint", "LlmClient", "LlmError", "Prices", "Usage"]
