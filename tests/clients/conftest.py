"""A server, its customers, and programs that are run against it."""

import time
from collections.abc import Callable

import pytest

from tests.clients.programs import Program
from tests.fakes.provider import run_in_thread
from tests.serving import MODEL, SQLITE, audited

Run = Callable[..., dict]


@pytest.fixture(scope="session")
def upstream():
    with run_in_thread() as provider:
        yield provider


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    """Where the server has its configuration and its data."""
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="session")
def served(data_folder, upstream):
    """A running server, whose books add up in the end."""
    with audited(data_folder, SQLITE, upstream.base_url, calls_min=1) as server:
        yield server


@pytest.fixture(scope="session")
def funded(served) -> str:
    """A key with credits behind it."""
    return served.customer("funded@example.com")


@pytest.fixture(scope="session")
def broke(served) -> str:
    """A key with an empty wallet behind it."""
    return served.customer("broke@example.com", None)


@pytest.fixture(scope="session")
def run(request, served, funded, broke) -> Run:
    """Run a program against the server; all of its usual scenarios, or those that are named."""

    def run_program(program: Program, *scenarios: str) -> dict:
        def node_folder():
            return request.getfixturevalue("node_modules")

        return program.run(node_folder, served.base_url, funded, broke, MODEL, *scenarios)

    return run_program


@pytest.fixture
def closed(served, funded) -> Callable[[str], dict]:
    """The charge of a call, once it is not open any more."""

    def charge_once_closed(request_id: str) -> dict:
        return served.ended(funded, request_id, within_s=20)

    return charge_once_closed


@pytest.fixture
def reserved(served, funded) -> Callable[[], str]:
    """What is held of the credits, once the calls under way have had their time to end."""

    def reserved_in_the_end() -> str:
        with served.client(funded) as http:
            for _ in range(400):
                amount = http.get("/api/v1/credits/balance").json()["reserved"]
                if amount == "0":
                    break
                time.sleep(0.05)
        return amount

    return reserved_in_the_end
