"""libgqa's errors as exceptions."""
import errno
import os


class Error(Exception):
    """A call failed. errno: as libgqa returned it, positive; code: the daemon's own code, 0 where it was not the
    daemon that spoke; name: "BUSY", "ECONNRESET"; retry_after: seconds, or None."""

    def __init__(self, status, message=None, code=0, name=None, retry_after=None):
        super().__init__(message or os.strerror(-status))
        self.errno, self.code, self.retry_after = -status, code, retry_after
        self.name = name or errno.errorcode.get(-status, "ERROR")


class ConnectionLost(Error, ConnectionError):
    """The daemon went away, or the connection was lost before. What was asked may or may not have been done; it is
    not asked again. Connection.reconnect() opens it anew."""


class Timeout(Error, TimeoutError):
    """A deadline passed; the daemon was told to stop."""


class Busy(Error):
    """A queue or quota is full; retry_after tells when to come again."""


class Cancelled(Error):
    """The call was cancelled, or the connection closed."""


class NotFound(Error):
    """There is no such model, backend or socket."""


class InvalidParams(Error, ValueError):
    """A parameter is missing, of a wrong type, or out of its range; the message names it."""


_CLASSES = {errno.ECONNRESET: ConnectionLost, errno.ENOTCONN: ConnectionLost, errno.ECONNREFUSED: ConnectionLost,
            errno.EPROTO: ConnectionLost, errno.ETIMEDOUT: Timeout, errno.EBUSY: Busy, errno.ECANCELED: Cancelled,
            errno.ENOENT: NotFound, errno.EINVAL: InvalidParams}


def make(status, details=None, what=None):
    """The exception for a -errno; details: a struct gqa_error, or None."""
    kind = _CLASSES.get(-status, Error)
    if details is None:
        return kind(status, f"{what}: {os.strerror(-status)}" if what else None)
    return kind(status, details.message.decode("utf-8", "replace"), details.code, details.name.decode("ascii", "replace"),
                details.retry_after_ms / 1000 if details.retry_after_ms else None)
