"""The one exception that stands for a user's mistake."""


class UserError(ValueError):
    """Wrong input: one line that says what, where, and what is allowed. The command line prints it and exits with 2."""


def require(condition: bool, key: str, problem: str) -> None:
    """Raise `UserError("key: problem")` unless `condition` holds."""
    if not condition:
        raise UserError(f"{key}: {problem}")
