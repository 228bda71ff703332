import kept
import pytest

# Not in a fixture: many parameters are composed while tests are collected.
kept.keep_all()

LONGEST = ("policy_studies", "attention_triton", "blocks", "cli", "faults", "search_whole", "killed", "subject_studies")
"""Files that take minutes. One that is begun last leaves the other processes idle."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    first = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: first.get(item.path.stem, len(first)))


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs that only pretend, where there may be no GPU."""
    from helpers import PretendedGraph  # imports the model, which most files do without

    from pi0exp.graphs import capture

    monkeypatch.setattr(capture, "Graph", PretendedGraph)


@pytest.fixture
def study(request: pytest.FixtureRequest) -> str:
    """A study of a test's own, in a store that it shares with others."""
    return "".join(c if c.isalnum() else "_" for c in request.node.name)
