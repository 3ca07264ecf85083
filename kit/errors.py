"""Every error of the kit, on one page: import them from here.

    KitError            one clear line instead of a traceback; `kit` ends with `exit_status`
    ├── ParamError          a parameter or a word of the command line is wrong: exit status 2
    ├── StageFailed         a notebook ended with an error
    ├── LakeError           the lake cannot be read or written
    │   └── MissingInput    a stage before this one has no result
    ├── ArchiveError        an archive cannot be opened
    ├── FetchError          bytes could not be had; an OSError as well, for whoever reads files
    │   └── Missing         nothing is there; a FileNotFoundError as well
    ├── JobError            a person's job file cannot be run
    ├── GuardError          the work in a guarded process broke, not an item of it
    ├── SparkError          Spark cannot start, or a task died
    ├── ModelError          a model, its rows or its training
    ├── AthenaError         Athena refuses a request, or a query ended badly
    └── EventError          a message is no S3 event
    RecordError         one record of millions cannot be read: counted under its reason, never shown

Whoever meets an error of a library turns it into one of these where the user can act on it, with `from None`: the line
says what to do. Anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

from urllib.parse import urlsplit


class KitError(Exception):
    """A problem the user can act on: one clear line instead of a traceback.

    `exit_status` is what the `kit` command ends with: 1 a stage failed, 2 wrong words or parameters.
    """

    exit_status = 1

    def _render_traceback_(self) -> list[str]:
        """What IPython prints in a notebook: the line, not the stack (IPython's own hook name)."""
        return [f"{type(self).__name__}: {self}"]


class ParamError(KitError):
    """A parameter that does not exist or has a value of the wrong kind."""

    exit_status = 2


class StageFailed(KitError):
    """A notebook ended with an error; the message is the error's own line and where to read more."""


class LakeError(KitError):
    """The lake cannot be read or written, or what it holds is not what it should be."""


class MissingInput(LakeError):
    """A stage that this one reads has no committed result."""


class ArchiveError(KitError):
    """An archive that cannot be opened at all."""


class FetchError(KitError, OSError):
    """Bytes that could not be had.

    `reason` is the short name to count. `again` says whether to try again now, None: the reason decides
    (`kit.data.read.polite.may_retry`); `wait_s` is the least wait before that.
    """

    def __init__(self, reason: str, uri: str = "", again: bool | None = None, wait_s: float = 0) -> None:
        super().__init__(f"{reason} ({_without_secrets(uri)})" if uri else reason)
        self.reason = reason
        self.again = again
        self.wait_s = wait_s


def _without_secrets(uri: str) -> str:
    """`uri` without what may be secret: user, password, query (signatures) and fragment."""
    parts = urlsplit(uri)
    host = parts.netloc.rpartition("@")[2].lower()
    return parts._replace(netloc=host, query="", fragment="").geturl()


class Missing(FetchError, FileNotFoundError):
    """404 and 410: nothing there."""


class JobError(KitError):
    """A job file that cannot be run."""


class GuardError(KitError):
    """The work itself broke, not an item of it: a bug, or a machine without memory for a second process."""


class SparkError(KitError):
    """Spark cannot start, or a task died in a way that its own code did not report."""


class ModelError(KitError):
    """A model that cannot be had, rows that cannot be trained on, or a training that went wrong."""


class AthenaError(KitError):
    """A request that Athena's own model refuses, or a query that ended badly."""


class EventError(KitError):
    """A message that is no S3 event."""


class RecordError(Exception):
    """One record that cannot be read; `reason` is the name it is counted under."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
