"""The errors of `server`, and the one map from errors to HTTP statuses and exit codes.

    ServerError
    ├── ConfigError             a flag, a key of the config file, an environment variable      exit code 2
    ├── LoadError               a model could not be loaded                                    exit code 1
    │   ├── UnusableCheckpointError  ... because of what its files hold
    │   └── DoesNotFitError     ... because the plan says it does not fit                      exit code 3
    └── RequestError            a request that is refused                                      400
        ├── AuthenticationError no key, or a wrong one                                         401
        ├── ForbiddenHostError  a Host or Origin header that this server is not meant for      403
        ├── PathNotFoundError   a path that this server does not have, or does not open        404
        ├── ModelNotFoundError  a model of that name is not served here                        404
        ├── BodyTimeoutError    the request body did not arrive in time                        408
        ├── ModelExistsError    a model of that name is served already                         409
        ├── BodyTooLargeError   more bytes than the limit                                      413
        ├── ModelRefusedError   a model to be loaded whose checkpoint can't be served          422
        ├── OverloadedError     the queue is full; carries Retry-After                         429
        ├── EngineFaultError    the engine failed in a step of this request                    500
        ├── UnforeseenError     an error of the server's own                                   500
        ├── EngineUnavailableError   the model's engine is loading, starting again, or dead    503
        ├── DeadlineExceededError    the request's time was up before it was complete          504
        ├── ModelFailedError    a model to be loaded whose engine failed                       500
        └── InsufficientMemoryError  a model to be loaded that does not fit                    507

`quant` has a tree of its own (quant/errors.py); the two meet in engine/process.py, which turns a QuantError into a
LoadFailed record, because the HTTP process must not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

from server.records import LoadFailed, Shortage


class ServerError(Exception):
    """The root: everything `server` raises on purpose."""

    exit_code: ClassVar[int] = 1


class ConfigError(ServerError):
    """The sentence names the key, its value, and what is accepted."""

    exit_code = 2


class LoadError(ServerError):
    """A model that could not be loaded."""


class UnusableCheckpointError(LoadError):
    """The files are at fault: broken, incomplete, or of an architecture that is not served."""


class DoesNotFitError(LoadError):
    """The plan's bytes are more than the device has; the message carries the arithmetic, `shortage` its result."""

    exit_code = 3

    def __init__(self, message: str, shortage: Shortage | None = None) -> None:
        super().__init__(message)
        self.shortage = shortage


class RequestError(ServerError):
    """A refused request. `param` is the JSON field at fault, where one is."""

    status: ClassVar[int] = 400
    kind: ClassVar[str] = "invalid_request_error"
    code: ClassVar[str | None] = None
    retry_after: int | None = None
    """Whole seconds after which the same request may succeed, where that can be told."""
    details: Mapping[str, str | int] = MappingProxyType({})
    """What a program may want to read of the message."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class AuthenticationError(RequestError):
    status = 401
    kind = "authentication_error"
    code = "invalid_api_key"


class ForbiddenHostError(RequestError):
    """Refused before routing: what keeps a web page from reaching a loopback server by DNS rebinding."""

    status = 403
    kind = "permission_error"
    code = "forbidden_host"


class PathNotFoundError(RequestError):
    status = 404

    def __init__(self, path: str) -> None:
        super().__init__(f"there is no {path!r} here; /openapi.json lists what there is")


class ModelNotFoundError(RequestError):
    status = 404
    kind = "not_found_error"
    code = "model_not_found"


class BodyTimeoutError(RequestError):
    status = 408
    code = "body_timeout"


class ModelExistsError(RequestError):
    status = 409
    code = "model_exists"


class ModelRefusedError(RequestError):
    """The entry is well-formed, and what it names can't be served."""

    status = 422
    code = "checkpoint_refused"


class BodyTooLargeError(RequestError):
    status = 413
    code = "body_too_large"


class OverloadedError(RequestError):
    """The queue is full. `retry_after` is whole seconds, computed from the queue and the recent pace."""

    status = 429
    kind = "rate_limit_error"
    code = "overloaded"

    def __init__(self, message: str, *, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineFaultError(RequestError):
    """The model failed in a step of this request; the request was not at fault and may be tried again."""

    status = 500
    kind = "internal_error"
    code = "engine_error"


class UnforeseenError(RequestError):
    """An error of the server's own that nobody foresaw: the log has it, and clients are told no more than this."""

    status = 500
    kind = "internal_error"
    code = "internal_error"

    def __init__(self) -> None:
        super().__init__("the server failed on this request; its log has the details")


class ModelFailedError(RequestError):
    """The model's engine failed or died while it loaded; neither the entry nor the files are known to be at fault."""

    status = 500
    kind = "internal_error"
    code = "load_failed"


class EngineUnavailableError(RequestError):
    status = 503
    kind = "service_unavailable_error"
    code = "engine_unavailable"

    def __init__(self, message: str, *, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineExceededError(RequestError):
    """The request's own timeout or the server's; 504 is what gRPC's DEADLINE_EXCEEDED becomes over HTTP."""

    status = 504
    kind = "timeout_error"
    code = "deadline_exceeded"


class InsufficientMemoryError(RequestError):
    """The plan's bytes are more than there are; nothing was allocated. `details` has the numbers."""

    status = 507
    kind = "insufficient_memory_error"
    code = "does_not_fit"

    def __init__(self, message: str, shortage: Shortage | None) -> None:
        super().__init__(message)
        if shortage is not None:
            self.details = {
                "device": shortage.device,
                "needed_bytes": shortage.needed,
                "available_bytes": shortage.available,
            }


_LOAD_FAILURES: dict[str, type[ServerError]] = {
    "config": ConfigError,
    "checkpoint": UnusableCheckpointError,
}


def load_failure(record: LoadFailed) -> ServerError:
    """The error that a record stands for; its class carries the exit code."""
    if record.kind == "does_not_fit":
        return DoesNotFitError(record.message, record.shortage)
    return _LOAD_FAILURES.get(record.kind, LoadError)(record.message)


def load_refusal(error: ServerError) -> RequestError:
    """What a request to load a model is told, where `error` would have ended a start."""
    match error:
        case RequestError():
            return error
        case ConfigError():
            return RequestError(str(error))
        case UnusableCheckpointError():
            return ModelRefusedError(str(error))
        case DoesNotFitError():
            return InsufficientMemoryError(str(error), error.shortage)
    return ModelFailedError(str(error))
