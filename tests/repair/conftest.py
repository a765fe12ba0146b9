from tests.models.conftest import lonely

__all__ = ["lonely"]
