"""The one place where errors become gRPC codes, and where calls are admitted, logged and counted. Owns no state.

The log shows the fields of `_SHOWN` and no others: what is not named there (secrets, contexts) cannot get into it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, Final

import grpc
from grpc import StatusCode

from phfs_csi.errors import CsiError, of_phfs
from phfs_csi.metrics import Metrics
from phfs_csi.rpc.admission import Admission

log = logging.getLogger(__name__)

_SHOWN: Final = ("name", "volume_id", "staging_target_path", "target_path", "volume_path", "readonly")
_CHARS_MAX: Final = 256
_QUIET: Final = frozenset(  # asked every few seconds
    {"Probe", "GetPluginInfo", "GetPluginCapabilities", "NodeGetInfo", "NodeGetCapabilities", "NodeGetVolumeStats"}
    | {"ControllerGetCapabilities"}
)
_BUG: Final = "internal error of the plugin, its log has the details"

Behaviour = Callable[[Any, grpc.ServicerContext], Any]


class Boundary(grpc.ServerInterceptor):
    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._admission = Admission()

    def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        handler = continuation(handler_call_details)
        if handler is None or handler.unary_unary is None:
            return handler
        method = handler_call_details.method.rpartition("/")[2]
        return grpc.unary_unary_rpc_method_handler(
            self._guarded(method, handler.unary_unary),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _guarded(self, method: str, behaviour: Behaviour) -> Behaviour:
        def admitted(request: Any, context: grpc.ServicerContext) -> Any:
            with self._admission.hold(method, request):
                return behaviour(request, context)

        def answer(request: Any, context: grpc.ServicerContext) -> Any:
            if not context.is_active():  # waited for a thread until its caller had gone
                context.abort(StatusCode.CANCELLED, "the caller has gone")
            start = time.monotonic()
            response, code, details = _outcome(method, admitted, request, context)
            seconds = time.monotonic() - start
            self._metrics.answered(method, code.name, seconds)
            _log(method, request, code, details, seconds)
            if code is not StatusCode.OK:
                context.abort(code, details)
            return response

        return answer


def _outcome(
    method: str, behaviour: Behaviour, request: Any, context: grpc.ServicerContext
) -> tuple[Any, StatusCode, str]:
    try:
        return behaviour(request, context), StatusCode.OK, ""
    except CsiError as exc:
        return None, exc.code, str(exc)
    except NotImplementedError:  # of the stubs
        return None, StatusCode.UNIMPLEMENTED, f"{method} is not implemented"
    except Exception as exc:
        if (answer := of_phfs(exc)) is None:
            log.exception("%s failed", method)
            return None, StatusCode.INTERNAL, _BUG
        return None, answer.code, str(answer)


def _log(method: str, request: Any, code: StatusCode, details: str, seconds: float) -> None:
    level = logging.WARNING if code is not StatusCode.OK else logging.DEBUG if method in _QUIET else logging.INFO
    if log.isEnabledFor(level):
        log.log(level, "%s%s code=%s seconds=%.3f%s", method, shown(request), code.name, seconds, _reason(details))


def shown(request: Any) -> str:
    """What the log may say of a request: ` name=value ...`, on one line whatever the caller wrote."""
    fields = ((name, getattr(request, name, None)) for name in _SHOWN)
    return "".join(f" {name}={_one_line(str(value))}" for name, value in fields if value)


def _reason(details: str) -> str:
    return f" reason={_one_line(details)}" if details else ""


def _one_line(text: str) -> str:
    return ascii(text[:_CHARS_MAX]) if len(text) > _CHARS_MAX or not text.isprintable() else text
