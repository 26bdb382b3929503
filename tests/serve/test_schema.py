"""Requests made up from the service's own OpenAPI schema: valid ones, broken ones, and no answer of 500."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import requests

from instaflow.generate import InstaFlow
from instaflow.models.hub import CONTROLS

schemathesis = pytest.importorskip("schemathesis", reason="the package schemathesis is not installed")
from hypothesis import HealthCheck, given, settings  # noqa: E402  # it comes with schemathesis
from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance  # noqa: E402

CHECKS = (not_a_server_error, status_code_conformance, response_schema_conformance)
BOUNDED = settings(
    max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=[*HealthCheck]
)


@pytest.mark.parametrize("mode", schemathesis.GenerationMode)
def test_no_request_breaks_it(
    mode: object, serving: Callable[..., AbstractContextManager[str]], flow: InstaFlow
) -> None:
    statuses = set()
    with serving(flow, controls={"edges": CONTROLS / "edges"}) as url, requests.Session() as session:
        session.trust_env = False
        for found in schemathesis.openapi.from_url(f"{url}/openapi.json").get_all_operations():
            operation = found.ok()
            if mode == schemathesis.GenerationMode.NEGATIVE and not operation.body:
                continue  # nothing that could be wrong

            @BOUNDED
            @given(case=operation.as_strategy(generation_mode=mode))
            def fuzz(case: schemathesis.Case) -> None:
                answer = case.call_and_validate(checks=CHECKS, session=session)
                statuses.add(answer.status_code)

            fuzz()
    assert 400 in statuses and max(statuses) < 500
