"""The options that name a language model, shared by the commands that can ask one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from robustvlm.llm import LlmClient

LlmUrl = Annotated[
    str | None,
    typer.Option(
        "--llm",
        metavar="URL",
        help="OpenAI-compatible endpoint, as http://localhost:11434/v1; the key is read from ROBUSTVLM_LLM_KEY or "
        "OPENAI_API_KEY.",
    ),
]
LlmModel = Annotated[str | None, typer.Option("--llm-model", metavar="NAME", help="Model to ask at that endpoint.")]
LlmPrices = Annotated[
    str | None,
    typer.Option("--llm-prices", metavar="IN,OUT", help="Price of a million tokens, to show what was spent."),
]


def make_client(url: str | None, model: str | None, prices: str | None = None) -> LlmClient | None:
    """Return the client that the options name, None where they name none.

    Raises:
        UserError: one option without the other, no URL, or prices that are none.

    Example:
        >>> make_client(None, None) is None
        True
    """
    from robustvlm.errors import UserError
    from robustvlm.llm import Endpoint, LlmClient, Prices

    if prices is not None:
        Prices.parse(prices)
        if url is None and model is None:
            raise UserError("--llm-prices is for --llm URL and --llm-model NAME")
    if url is None and model is None:
        return None
    if url is None or model is None:
        raise UserError("--llm URL and --llm-model NAME belong together")
    return LlmClient(Endpoint(url, model))


def spent(client: LlmClient, prices: str | None) -> str:
    """Return one line on requests, tokens and cost."""
    from robustvlm.llm import Prices

    return f"{client.endpoint.model}: {client.usage.describe(None if prices is None else Prices.parse(prices))}"
