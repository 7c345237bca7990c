"""pytest's flags: --benchmark runs bench/ (and nothing else), --peers lists whom it compares with, --slow adds the long
fuzzers."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--benchmark", action="store_true", help="run the benchmarks in bench/")
    parser.addoption("--peers", action="store_true", help="list the libraries benchmarks compare with, and exit")
    parser.addoption("--slow", action="store_true", help="also run tests that take minutes")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--peers"):
        from bench.peers import listing

        pytest.exit(f"libraries compared with\n{listing()}", returncode=0)
    if config.getoption("--benchmark") and config.args == config.getini("testpaths"):
        config.args = ["bench"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        skip = pytest.mark.skip(reason="takes minutes; run with --slow")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(skip)
