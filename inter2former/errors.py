"""Everything that the core raises on purpose.

    Inter2FormerError        base; has a stable `code`, a sentence and a hint
    ├── ConfigError          a ModelConfig field or a setting has an impossible value
    ├── CheckpointError      not a safetensors file, wrong keys or shapes, non-finite values
    ├── ImageError           undecodable, unsupported or over a limit
    ├── PromptError          no prompt, outside the image, not a number, wrong shape or dtype
    └── NumericError         the network produced a value that is not finite

The doors map `code` to a status; the text never holds user data beyond the value that is wrong.
"""


class Inter2FormerError(Exception):
    """Base of the tree. `code` is stable and meant for machines, `str()` for people."""

    code = "error"

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(f"{message} {hint}".strip())
        self.message = message
        self.hint = hint


class ConfigError(Inter2FormerError, ValueError):
    code = "config"


class CheckpointError(Inter2FormerError):
    code = "checkpoint"


class ImageError(Inter2FormerError, ValueError):
    code = "image"


class PromptError(Inter2FormerError, ValueError):
    code = "prompt"


class NumericError(Inter2FormerError):
    code = "numeric"
