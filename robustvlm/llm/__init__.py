"""A small client for language models behind any OpenAI-compatible endpoint: typed answers, retries, a cache, costs."""

from robustvlm.llm.client import LlmClient
from robustvlm.llm.endpoint import Endpoint, LlmError
from robustvlm.llm.usage import Prices, Usage

__all__ = ["Endpoint", "LlmClient", "LlmError", "Prices", "Usage"]
