"""What requests may say and answers look like: OpenAI's completions interface, with a few fields more.

null means a field's default everywhere. Symbols are bytes: ids 0 to 255. Source: OpenAI API reference, /v1/completions.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr, model_validator
from pydantic_core import PydanticCustomError
from starlette.exceptions import HTTPException

_LONGEST_MESSAGE = 500  # characters of an error: what a client sent may be part of it

START, START_TEXT = 256, "<|endoftext|>"
"""What may stand before a text given as ids, for clients that want something there: every text starts so anyway."""

UNKNOWN = "unknown_argument"
"""Type of the error for a field that there is not; its context has the `name`."""

Id = Annotated[StrictInt, Field(ge=0, le=START)]
# lists stop at their first mistake: an error for each of a million elements would be gigabytes
Ids = Annotated[list[Id], Field(fail_fast=True)]
Prompt = (
    StrictStr | Ids | Annotated[list[StrictStr], Field(fail_fast=True)] | Annotated[list[Ids], Field(fail_fast=True)]
)
Stop = Annotated[StrictStr, Field(min_length=1)]
Number = StrictFloat | StrictInt


def readable(text: str) -> str:
    """Text that can be encoded: a client may send half a surrogate pair."""
    return text.encode("utf-8", "backslashreplace").decode()


class ApiError(HTTPException):
    """A request that cannot be answered, as OpenAI says it: an HTTP status and an error body."""

    # an HTTPException, as FastAPI turns any other that comes while it reads a body into one of its own

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry: int | None = None
    ):
        super().__init__(status, message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry

    def body(self) -> dict[str, Any]:
        """The error body."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        param = self.param if self.param is None else _cut(self.param)  # the name of an unknown field, say
        return {"error": {"message": _cut(readable(self.detail)), "type": kind, "param": param, "code": self.code}}


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_MESSAGE else text[:_LONGEST_MESSAGE] + "..."


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every answer that is no success."""

    error: ErrorDetail


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _known(cls, values: Any) -> Any:
        """Stops at the first unknown field: an error for each of a million would be gigabytes."""
        unknown = (
            next((name for name in values if name not in cls.model_fields), None) if isinstance(values, dict) else None
        )
        if unknown is not None:
            raise PydanticCustomError(UNKNOWN, "Unrecognized request argument supplied", {"name": readable(unknown)})
        return values


class StreamOptions(_Request):
    """Of a streamed answer."""

    include_usage: StrictBool | None = None
    include_obfuscation: StrictBool | None = None
    """Accepted; nothing is obfuscated."""


class CompletionRequest(_Request):
    """Continue one or more prompts."""

    model: StrictStr | None = None
    """The name at /v1/models; may be left out."""
    prompt: Prompt | None = None
    """A text, ids of bytes, or a list of either. Default: the empty text."""
    max_tokens: Annotated[StrictInt, Field(ge=0)] | None = None
    """Bytes to write; by default 16, where so many are allowed."""
    temperature: Annotated[Number, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[StrictInt, Field(ge=0, le=256)] | None = None
    """Draw only from so many most likely bytes; 0: from all. Not OpenAI's."""
    n: Annotated[StrictInt, Field(ge=1)] | None = None
    """Choices for each prompt."""
    best_of: StrictInt | None = None
    """Only n itself."""
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    echo: StrictBool | None = None
    stop: Stop | Annotated[list[Stop], Field(fail_fast=True)] | None = None
    seed: Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)] | None = None
    suffix: StrictStr | None = None
    """Not supported."""
    presence_penalty: Number | None = None
    """Only 0."""
    frequency_penalty: Number | None = None
    """Only 0."""
    logit_bias: dict[str, Any] | None = None
    """Only empty; so nothing in it is looked at, nor is there an error for each of a million mistakes."""
    user: StrictStr | None = None
    """Accepted, without effect."""
    state: StrictStr | None = None
    """Go on from a state that an earlier answer named: the prompt is what follows. Not OpenAI's."""
    return_state: StrictBool | None = None
    """Keep the state after the text (and after the stop that ended it), and name it in the answer. Not OpenAI's."""
    gates: StrictBool | None = None
    """With each token the global gates [layers, layers] of its step. Not OpenAI's."""


class Logprobs(BaseModel):
    """Four lists, an entry a byte."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class Choice(BaseModel):
    """A continuation, or a piece of one."""

    index: int
    text: str
    logprobs: Logprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None
    state: str | None = None
    gates: list[list[list[float]] | None] | None = None


class Usage(BaseModel):
    """Bytes read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]


class Completion(BaseModel):
    """The answer, and each piece of a streamed one."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None = None


class ScoreRequest(_Request):
    """Bits that the model needs for texts."""

    text: Prompt
    """A text, ids of bytes, or a list of either."""


class TextScore(BaseModel):
    """Of one text."""

    bits: list[float]
    """-log2 p(byte | all before it), of each byte."""
    total_bits: float
    bpc: float | None
    """Bits a byte; null of an empty text."""


class ScoreAnswer(BaseModel):
    """Of each text in the order given."""

    scores: list[TextScore]


class TokenizeRequest(_Request):
    """Text to ids."""

    prompt: StrictStr
    model: StrictStr | None = None
    add_special_tokens: StrictBool | None = None
    """Accepted: there are none."""


class Tokens(BaseModel):
    """Ids of a text's bytes."""

    tokens: list[int]
    count: int
    max_model_len: int


class DetokenizeRequest(_Request):
    """Ids to text."""

    tokens: Ids
    model: StrictStr | None = None


class Text(BaseModel):
    """The text of ids."""

    prompt: str


class TokenizerInfo(BaseModel):
    """What clients ask of a tokenizer."""

    tokenizer_class: str = "ByteTokenizer"
    vocab_size: int = START + 1
    bos_token: str | None = START_TEXT
    eos_token: str = START_TEXT
    """No text ends; this is where the next would start."""
    pad_token: str | None = None
    chat_template: str | None = None


class Model(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "gfrnn"
    precision: str
    layers: int
    hidden_size: int
    gates: bool
    bpc: dict[str, float]


class Models(BaseModel):
    """All of them: one."""

    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    """How the server is."""

    status: Literal["ok", "stopping", "failed"]
    model: str
    provider: str
    rows: int
    rows_in_use: int
    waiting: int


class Given(NamedTuple):
    """A text of a prompt."""

    symbols: bytes
    marked: bool
    """Whether START stood before it."""


def texts(prompt: Prompt, param: str) -> list[Given]:
    """A prompt's texts. Raises ApiError for an empty list, for START elsewhere, and for what UTF-8 does not have."""
    if isinstance(prompt, str):
        return [Given(encode(prompt, param), False)]
    if not prompt:
        raise ApiError(400, f"{param} is an empty list; give at least one text", param=param)
    if isinstance(prompt[0], int):
        return [_of_ids(prompt, param)]
    return [Given(encode(each, param), False) if isinstance(each, str) else _of_ids(each, param) for each in prompt]


def _of_ids(ids: list[int], param: str) -> Given:
    marked = ids[:1] == [START]
    if START in ids[marked:]:
        raise ApiError(400, f"{param}: id {START} may only come first", param=param)
    return Given(bytes(ids[marked:]), marked)


def encode(text: str, param: str) -> bytes:
    """A text's bytes; raises ApiError for half of a surrogate pair, which UTF-8 does not have."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ApiError(400, f"{param} has half of a surrogate pair in it: no text", param=param) from error
