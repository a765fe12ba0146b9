from tests.llm.conftest import lonely

__all__ = ["lonely"]
