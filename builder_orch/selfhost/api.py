"""The platform's GraphQL API over HTTP: POST /graphql and GET /healthz."""

import asyncio
import json
import traceback
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from secrets import token_hex
from time import monotonic
from time import time as wall_clock
from typing import Any, Final
from weakref import WeakValueDictionary

import structlog
from aiohttp import web
from aiohttp.hdrs import AUTHORIZATION
from graphql import (
    DocumentNode,
    ExecutionResult,
    FieldNode,
    FragmentDefinitionNode,
    FragmentSpreadNode,
    GraphQLError,
    GraphQLSchema,
    NoSchemaIntrospectionCustomRule,
    OperationDefinitionNode,
    SelectionSetNode,
    build_schema,
    execute,
    parse,
    specified_rules,
    validate,
)

from builder_orch.selfhost.database import Code, Refused, is_full
from builder_orch.selfhost.resolvers import Asker, Builder, Gateway, Runner, Services, bind
from builder_orch.selfhost.rows import TokenRow
from builder_orch.selfhost.store import Store

__all__ = ["Builder", "Gateway", "Runner", "application"]

BODY_LIMIT: Final = 1 << 20
BODY_TIME_S: Final = 30.0
TOKEN_LIMIT: Final = 2000
"""Lexical tokens of one document."""
DEPTH_LIMIT: Final = 12
FIELD_LIMIT: Final = 200
"""Fields of one operation, fragments counted each time they are used."""
CREDENTIALS_LIMIT: Final = 8
"""Tokens in one header that are tried."""

Body = dict[str, Any]
"""A JSON object."""

_SERVER_ERROR: Final = "SERVER_ERROR"
_log = structlog.get_logger(__name__)


def application(
    store: Store,
    *,
    gateway: Gateway,
    builder: Builder,
    runner: Runner,
    clock: Callable[[], float] = wall_clock,
    introspection: bool = False,
) -> web.Application:
    """The API as an aiohttp application; whoever runs it opens and closes the rest.

    A GraphQL request that could be read is answered by an HTTP 200 with `data` or `errors`, each of
    them with `extensions.code`: UNAUTHORIZED, FORBIDDEN, NOT_FOUND, INVALID or SERVER_ERROR.
    """
    services = Services(store, gateway, builder, runner, clock, WeakValueDictionary())
    endpoint = _Endpoint(services, load_schema(), introspection=introspection)

    async def healthz(_request: web.Request) -> web.Response:
        try:
            store.ping()
        except Exception:
            _log.exception("store unreachable")
            return web.json_response({"status": "store unreachable"}, status=503)
        return web.json_response({"status": "ok"})

    app = web.Application(client_max_size=BODY_LIMIT)
    app.router.add_post("/graphql", endpoint.answer)
    app.router.add_get("/healthz", healthz)
    return app


@cache
def load_schema() -> GraphQLSchema:
    """Our schema with its resolvers; nothing in it changes."""
    text = files("builder_orch.selfhost").joinpath("schema.graphql").read_text("utf-8")
    schema = build_schema(text)
    bind(schema)
    return schema


class _Endpoint:
    """POST /graphql."""

    def __init__(self, services: Services, schema: GraphQLSchema, *, introspection: bool) -> None:
        self._services = services
        self._schema = schema
        hidden = () if introspection else (NoSchemaIntrospectionCustomRule,)
        self._rules = (*specified_rules, *hidden)

    async def answer(self, request: web.Request) -> web.Response:
        """One request, one JSON answer; nothing that goes wrong inside is told outside."""
        request_id, began = token_hex(8), monotonic()
        log = _log.bind(request_id=request_id)
        status, operation = 200, ""
        body: Body
        try:
            token = _authenticate(self._services.store, request)
            log = log.bind(token_id=token.id)
            query, variables, operation = _read(await _body(request))
            asker = Asker(self._services, token, request_id)
            result = await self._run(asker, query, variables, operation)
            body = self._shaped(result, request_id, log)
            if asker.extensions:
                body["extensions"] = asker.extensions
        except Refused as refused:
            body = {"data": None, "errors": [_error(str(refused), refused.code)]}
        except _Unreadable as unreadable:
            status = unreadable.status
            body = {"data": None, "errors": [_error(str(unreadable), Code.INVALID)]}
        except Exception as error:
            log.error("request failed", failure=_trace(error))  # noqa: TRY400 (see _trace)
            body = {"data": None, "errors": [_server_error(error, request_id)]}
        codes = [error["extensions"]["code"] for error in body.get("errors", ())]
        log.info("answered", operation=operation, codes=codes, took_s=round(monotonic() - began, 4))
        return web.json_response(body, status=status, headers={"X-Request-Id": request_id})

    async def _run(
        self, asker: Asker, query: str, variables: dict[str, object], operation: str
    ) -> ExecutionResult:
        try:
            document = parse(query, max_tokens=TOKEN_LIMIT)
            check_size(document)
        except GraphQLError as error:
            raise Refused(Code.INVALID, error.message) from None
        except RecursionError:
            raise Refused(Code.INVALID, "the document is nested too deeply") from None
        if errors := validate(self._schema, document, self._rules, max_errors=5):
            return ExecutionResult(None, errors)
        result = execute(
            self._schema,
            document,
            context_value=asker,
            variable_values=variables,
            operation_name=operation or None,
        )
        return result if isinstance(result, ExecutionResult) else await result

    def _shaped(
        self, result: ExecutionResult, request_id: str, log: structlog.typing.FilteringBoundLogger
    ) -> Body:
        body: Body = {"data": result.data}
        errors: list[Body] = []
        for error in result.errors or ():
            cause = error.original_error
            if isinstance(cause, Refused):
                shaped = _error(str(cause), cause.code)
            elif cause is None:
                shaped = _error(error.message, Code.INVALID)
            else:
                log.error("resolver failed", path=error.path, failure=_trace(cause))
                shaped = _server_error(cause, request_id)
            if error.path:
                shaped["path"] = error.path
            errors.append(shaped)
        if errors:
            body["errors"] = errors
        return body


class _Unreadable(Exception):
    """A body that is no GraphQL request; `status` is HTTP's."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def _authenticate(store: Store, request: web.Request) -> TokenRow:
    """The first token of the header that is good; what the last one lacks, otherwise."""
    scheme, _, credentials = request.headers.get(AUTHORIZATION, "").partition(" ")
    refused = Refused(Code.UNAUTHORIZED, "You must be authenticated to view this.")
    if scheme.lower() not in {"bearer", "flyv1"}:
        raise refused
    for text in credentials.split(",")[:CREDENTIALS_LIMIT]:
        try:
            return store.authenticate(text.strip())
        except Refused as error:
            refused = error
    raise refused


async def _body(request: web.Request) -> bytes:
    if request.content_type != "application/json":
        raise _Unreadable("the body is not application/json", 415)
    try:
        async with asyncio.timeout(BODY_TIME_S):
            return await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise _Unreadable(f"the body is over {BODY_LIMIT} octets", 413) from None
    except TimeoutError:
        raise _Unreadable("the body did not come in time", 408) from None


def _read(octets: bytes) -> tuple[str, dict[str, object], str]:
    """Query, variables and operation name of a request."""
    try:
        body = json.loads(octets)
    except (ValueError, RecursionError):
        raise _Unreadable("the body is not JSON", 400) from None
    fields = body if isinstance(body, dict) else {}
    query, variables = fields.get("query"), fields.get("variables") or {}
    operation = fields.get("operationName") or ""
    if not isinstance(query, str) or not isinstance(variables, dict):
        raise _Unreadable("the body is not a GraphQL request", 400)
    if not isinstance(operation, str):
        raise _Unreadable("operationName is not text", 400)
    return query, variables, operation


def check_size(document: DocumentNode) -> None:
    """GraphQLError for operations that are nested too deeply or ask for too many fields.

    Each fragment is measured once and counted wherever it is used, so that a few of them that use
    each other cannot hide an exponential number of fields.
    """
    fragments = {
        part.name.value: part
        for part in document.definitions
        if isinstance(part, FragmentDefinitionNode)
    }
    known: dict[str, tuple[int, int]] = {}

    def measure(selections: SelectionSetNode | None, within: frozenset[str]) -> tuple[int, int]:
        depth, count = 0, 0
        for selection in selections.selections if selections is not None else ():
            if isinstance(selection, FragmentSpreadNode):
                below, more = measure_fragment(selection.name.value, within)
            else:
                below, more = measure(getattr(selection, "selection_set", None), within)
                if isinstance(selection, FieldNode):
                    below, more = below + 1, more + 1
            depth, count = max(depth, below), count + more
        return depth, count

    def measure_fragment(name: str, within: frozenset[str]) -> tuple[int, int]:
        if name in within or name not in fragments:
            return 0, 0  # a circle or a gap, which validation names
        if name not in known:
            known[name] = measure(fragments[name].selection_set, within | {name})
        return known[name]

    for part in document.definitions:
        if isinstance(part, OperationDefinitionNode):
            depth, count = measure(part.selection_set, frozenset())
            if depth > DEPTH_LIMIT:
                raise GraphQLError(f"fields are nested over {DEPTH_LIMIT} deep")
            if count > FIELD_LIMIT:
                raise GraphQLError(f"over {FIELD_LIMIT} fields are asked for")


def _error(message: str, code: str) -> Body:
    return {"message": message, "extensions": {"code": code}}


def _server_error(error: BaseException, request_id: str) -> Body:
    what = "There is no room on the disk of" if is_full(error) else "Something went wrong on"
    return _error(f"{what} the platform (request {request_id}).", _SERVER_ERROR)


def _trace(error: BaseException) -> str:
    """A traceback as plain text: renderers that show local variables would show tokens."""
    return "".join(traceback.format_exception(error))
