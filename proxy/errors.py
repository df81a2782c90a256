"""Everything that can go wrong in a way somebody can act on.

    TollgateError
    ├── BadRequest                  the body or a parameter is not acceptable; says which and why
    │   ├── BodyTooLarge
    │   └── UnsupportedEncoding
    ├── Unauthenticated             no key or token, or one that is unknown, revoked or expired
    │   └── WrongPassword
    ├── Forbidden                   the caller is known and may not do this
    │   └── ModelNotAllowed
    ├── NotFound                    no such path or thing
    │   ├── ModelNotFound
    │   └── ProviderNotFound
    ├── Conflict                    the same idempotency key with other values, a name that is taken
    ├── NotCovered                  credits or a limit do not cover the call
    │   ├── InsufficientCredits
    │   └── KeyLimitReached
    ├── RateLimited
    ├── UpstreamFailed              the provider failed, and nothing was charged
    │   ├── UpstreamUnreachable       nothing was sent: trying another candidate costs nothing
    │   ├── UpstreamBroken            it failed after the request may have been read
    │   ├── UpstreamTimeout
    │   ├── UpstreamRefusedUs         its 401, 402 or 403: the operator's problem, not the caller's
    │   └── UpstreamRejected          its own error, to be passed on as it is
    ├── Unavailable                 the database or every provider is out of reach just now
    │   └── NotReady                    this process should get no calls
    ├── LedgerFault                 one ledger operation cannot be booked; others can
    └── SettingsError               the configuration is wrong; says where

An error is a fact with its data. It knows no HTTP status: `proxy.edge.errors` has the one table that maps them.
"""

from proxy.units import Nanos


class TollgateError(Exception):
    """The root of the tree above. `str(error)` is fit to be shown to the caller."""


def forget_frames(error: BaseException) -> None:
    """Let go of the frames through which `error`, and what caused it, has come; for whoever does not pass it on.

    A frame that keeps an error which came through it is a cycle with all that its callers hold, such as a call's body
    and what was read of its answer. It would wait for the garbage collector, which counts objects and not bytes.
    """
    chain: list[BaseException | None] = [error]
    while chain:
        each = chain.pop()
        if each is not None and each.__traceback__ is not None:
            each.__traceback__ = None
            chain += (each.__cause__, each.__context__)


def reason_of(error: BaseException) -> str:
    """What a driver says of its error, or of the one that caused `error`, and where, in one line for operators."""
    cause = error.__cause__ if isinstance(error, TollgateError) and error.__cause__ is not None else error
    lines = str(getattr(cause, "orig", None) or cause).strip().splitlines()
    return " at ".join([lines[0] if lines else type(cause).__name__, *getattr(error, "__notes__", ())])


class BadRequest(TollgateError):
    """The request cannot be served as it stands.

    `param` names the field at fault as OpenAI's errors do, `code` is a stable word for programs.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class BodyTooLarge(BadRequest):
    """The body is longer than the operator's limit of `bytes_max` bytes."""

    def __init__(self, bytes_max: int) -> None:
        super().__init__(f"The request body is over the limit of {bytes_max} bytes.", code="request_too_large")
        self.bytes_max = bytes_max


class UnsupportedEncoding(BadRequest):
    """The body came with a `Content-Encoding`, which could hide any size."""

    def __init__(self, encoding: str) -> None:
        super().__init__(
            f"Request bodies must not be encoded; this one says Content-Encoding: {encoding}.",
            code="unsupported_content_encoding",
        )


class Unauthenticated(TollgateError):
    """No valid credential came with the request."""


class WrongPassword(Unauthenticated):
    """The address or the password is wrong, and nobody is told which."""

    def __init__(self) -> None:
        super().__init__("The e-mail address or the password is wrong.")


class Forbidden(TollgateError):
    """The caller is known and is not allowed this; `code` says which rule."""

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message)
        self.code = code


class ModelNotAllowed(Forbidden):
    """The caller may not use all of what would serve; `allowed` (`provider/model`) is what it may use of it."""

    def __init__(self, allowed: tuple[str, ...]) -> None:
        super().__init__("This caller may not use this model.", code="model_not_allowed")
        self.allowed = allowed


class NotFound(TollgateError):
    """There is no such thing, or none that this caller may know of."""

    code = "not_found"
    param: str | None = None


class ModelNotFound(NotFound):
    """Nothing priced and enabled serves the model that was asked for; or not the one `provider` that may."""

    code = "model_not_found"
    param = "model"

    def __init__(self, model: str, provider: str | None = None) -> None:
        by = "here" if provider is None else f"by the provider {provider!r}"
        super().__init__(
            f"The model {model!r} does not exist or is not offered {by}. GET /v1/models lists those that are."
        )
        self.model = model


class ProviderNotFound(NotFound):
    """No provider of this name serves just now."""

    code = "provider_not_found"
    param = "provider"

    def __init__(self, provider: str) -> None:
        super().__init__(
            f"There is no provider {provider!r} that serves here. GET /api/v1/llm/providers lists those that do."
        )
        self.provider = provider


class Conflict(TollgateError):
    """What was asked contradicts what is already there; `code` says what."""

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message)
        self.code = code


class NotCovered(TollgateError):
    """Base of the refusals for want of money: nothing was sent to a provider.

    `required` is the least that the call needs, `available` what is left for it, in nano-credits.
    """

    def __init__(self, message: str, *, required: Nanos, available: Nanos) -> None:
        super().__init__(message)
        self.required = required
        self.available = available


class InsufficientCredits(NotCovered):
    """The wallet does not cover the call.

    `reserved` is what its other open calls hold, in nano-credits. `tokens_affordable` is the maximum of output tokens
    with which this call would be covered, where that is known. `is_temporary` when only the other open calls stand in
    the way.
    """

    def __init__(
        self,
        *,
        required: Nanos,
        available: Nanos,
        reserved: Nanos,
        tokens_affordable: int | None = None,
        is_temporary: bool = False,
    ) -> None:
        super().__init__("Your credits do not cover this call.", required=required, available=available)
        self.reserved = reserved
        self.tokens_affordable = tokens_affordable
        self.is_temporary = is_temporary


class KeyLimitReached(NotCovered):
    """The key's own spending limit does not cover the call, whatever the wallet holds."""

    def __init__(self, *, required: Nanos, available: Nanos) -> None:
        message = "This API key's spending limit does not cover this call."
        super().__init__(message, required=required, available=available)


class RateLimited(TollgateError):
    """Too many requests, tokens or concurrent calls; another try makes sense after `retry_after_s` seconds."""

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class UpstreamFailed(TollgateError):
    """Base of what providers do to us. The call was not charged."""

    def __init__(self, message: str, *, provider: str) -> None:
        super().__init__(message)
        self.provider = provider


class UpstreamUnreachable(UpstreamFailed):
    """No connection was made, so the provider read nothing."""


class UpstreamBroken(UpstreamFailed):
    """The connection broke, or what came over it is not HTTP, after the request may have been read."""


class UpstreamTimeout(UpstreamFailed):
    """The provider took the request and did not answer in time: it may have done, and billed, the work."""


class UpstreamRefusedUs(UpstreamFailed):
    """The provider rejects the operator's own credentials or account (`status` 401, 402 or 403)."""

    def __init__(self, message: str, *, provider: str, status: int) -> None:
        super().__init__(message, provider=provider)
        self.status = status


class UpstreamRejected(UpstreamFailed):
    """The provider answered with an error of its own.

    `status` and `body` are as they came, `headers` those of its header fields that go to the client, without what
    they say of the body.
    """

    def __init__(self, *, provider: str, status: int, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
        super().__init__(f"The provider answered with status {status}.", provider=provider)
        self.status = status
        self.body = body
        self.headers = headers

    @property
    def retry_after(self) -> str | None:
        """The value of its `Retry-After` field, if it has one."""
        return next((value.decode("latin-1") for name, value in self.headers if name == b"retry-after"), None)


class Unavailable(TollgateError):
    """Something we need is out of reach just now; nothing was charged; try again in `retry_after_s` seconds."""

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NotReady(Unavailable):
    """This process should get no calls just now; `checks` has what was looked at, and what was found."""

    def __init__(self, checks: dict[str, str]) -> None:
        super().__init__("This server is not ready for calls.", retry_after_s=2)
        self.checks = checks


class LedgerFault(TollgateError):
    """An operation that the ledger cannot book, by itself or with any other: a bug, never a caller's doing."""


class SettingsError(TollgateError):
    """The configuration or the environment is wrong; the message names the place."""
