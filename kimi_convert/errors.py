"""Every error that a user of kimi-convert can meet, and the exit code that each one means.

    KimiConvertError                 base; never raised itself
      UsageError            exit 2   the call asks for something that does not exist
      InputError            exit 3   what was given is not valid
        ConfigError                  config.json contradicts itself or is not understood
        CheckpointError              shards, index, names, shapes, dtypes, values
        MappingError                 a names or rules table does not cover a checkpoint
        RecipeError                  a recipe file or field
        CalibrationError             text or a teacher that nothing can be fitted to
        TooLittleTextError           not enough tokens for what they are for
        TokenizerError               tokenizer files missing or not understood
        OutputError                  the output folder is taken, or is the input
        KernelInputError             shapes or dtypes handed to a kernel (also a ValueError)
      HubError              exit 4   network, authorisation, repository
      ResourceError         exit 5   disk, memory, permission to write
      VerificationError     exit 6   the result was checked and is wrong

Anything else that escapes is a bug: traceback, exit 1. An interrupt is exit 130.
"""

from __future__ import annotations


class KimiConvertError(Exception):
    """What went wrong, where, what was expected and found, and what to do next."""

    exit_code = 1

    def __init__(
        self,
        message: str,
        *,
        where: object = "",
        expected: object = "",
        found: object = "",
        hint: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.where = str(where)
        self.expected = str(expected)
        self.found = str(found)
        self.hint = hint

    def __str__(self) -> str:
        """One line with everything but the hint."""
        details = (("in", self.where), ("expected", self.expected), ("found", self.found))
        said = ", ".join(f"{label} {text}" for label, text in details if text)
        return f"{self.message} ({said})" if said else self.message

    def to_json(self) -> dict[str, object]:
        """The document that `--json` prints for an error."""
        return {
            "error": {
                "type": type(self).__name__,
                "message": self.message,
                "where": self.where,
                "expected": self.expected,
                "found": self.found,
                "hint": self.hint,
                "exit_code": self.exit_code,
            }
        }


class UsageError(KimiConvertError):
    """The call asks for something that does not exist."""

    exit_code = 2


class InputError(KimiConvertError):
    """What was given is not valid."""

    exit_code = 3


class ConfigError(InputError):
    """config.json contradicts itself or is not understood."""


class CheckpointError(InputError):
    """Shards, index, tensor names, shapes, dtypes or values are not as they must be."""


class MappingError(InputError):
    """A names or rules table does not cover a checkpoint exactly."""


class RecipeError(InputError):
    """A recipe file or one of its fields is not valid."""


class CalibrationError(InputError):
    """Nothing can be fitted: too little text, or values that are not finite."""


class TooLittleTextError(InputError):
    """A text has not enough tokens for what it is for."""


class TokenizerError(InputError):
    """Tokenizer files are missing or not understood."""


class OutputError(InputError):
    """The output folder is taken, or is the input."""


class KernelInputError(InputError, ValueError):
    """A kernel was given shapes, dtypes or devices that it does not take."""


class HubError(KimiConvertError):
    """Network, authorisation or repository."""

    exit_code = 4


class ResourceError(KimiConvertError):
    """Not enough disk or memory, or no permission to write."""

    exit_code = 5


class VerificationError(KimiConvertError):
    """The result was checked and is wrong."""

    exit_code = 6
