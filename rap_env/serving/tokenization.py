"""Routes ``/tokenize`` and ``/detokenize``, with the bodies of vLLM's server."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from rap_env.serving.errors import invalid
from rap_env.serving.prompts import RequestBuilder
from rap_env.serving.schemas import read_json, validate_fields
from rap_env.serving.settings import ServerSettings


class TokenizeRequest(BaseModel):
    """Body of ``POST /tokenize``: a text (`prompt`), or `messages` of a chat.

    `add_special_tokens` is true for a text and false for messages unless it is given, since a chat
    template writes the special tokens itself.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    return_token_strs: bool | None = None


class DetokenizeRequest(BaseModel):
    """Body of ``POST /detokenize``: token ids."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0)]]


def tokenization_router(
    builder: RequestBuilder, tokenizer: Any, settings: ServerSettings, *, context_tokens: int
) -> APIRouter:
    """Make the routes ``/tokenize`` and ``/detokenize``.

    Args:
        builder: Encodes texts and messages exactly as for completions.
        tokenizer: The model's tokenizer.
        settings: Limits of the server.
        context_tokens: Most tokens of a prompt and its answer together.
    """
    router = APIRouter()

    def encode(body: TokenizeRequest) -> list[int]:
        if (body.prompt is None) == (body.messages is None):
            raise invalid("Give either 'prompt' or 'messages'.", "prompt")
        special = body.add_special_tokens
        if body.prompt is not None:
            return builder.encode_text(body.prompt, add_special_tokens=special is not False)
        assert body.messages is not None
        return builder.encode_chat(
            body.messages,
            add_generation_prompt=body.add_generation_prompt,
            add_special_tokens=bool(special),
        )

    def decode(body: DetokenizeRequest) -> str:
        if body.tokens and max(body.tokens) >= len(tokenizer):
            raise invalid(
                f"Token {max(body.tokens)} is not in the tokenizer's vocabulary "
                f"(0 to {len(tokenizer) - 1}).",
                "tokens",
            )
        text: str = tokenizer.decode(body.tokens, clean_up_tokenization_spaces=False)
        return text

    @router.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        body = validate_fields(TokenizeRequest, await read_json(request, settings))
        builder.check_model(body.model)
        tokens = await asyncio.to_thread(encode, body)
        texts = tokenizer.convert_ids_to_tokens(tokens) if body.return_token_strs else None
        return JSONResponse(
            {
                "count": len(tokens),
                "max_model_len": context_tokens,
                "tokens": tokens,
                "token_strs": texts,
            }
        )

    @router.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        body = validate_fields(DetokenizeRequest, await read_json(request, settings))
        builder.check_model(body.model)
        return JSONResponse({"prompt": await asyncio.to_thread(decode, body)})

    return router
