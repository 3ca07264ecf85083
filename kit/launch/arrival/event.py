"""Which file has landed: events of S3, of SQS around them, and of a watched folder."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from urllib.parse import unquote_plus

from kit.errors import EventError


class Landed(NamedTuple):
    """A created object, `path` is bucket and key; of two of one path the one with the greater sequencer is later."""

    path: str
    sequencer: str
    version: str | None = None
    time: str = ""


def landed(event: Mapping[str, Any]) -> list[Landed]:
    """The created objects of an event of S3, SQS, SNS or EventBridge, however wrapped; raises `EventError`."""
    try:
        if event.get("Event") == "s3:TestEvent":
            return []
        if event.get("Type") == "Notification":  # SNS → SQS
            return landed(json.loads(event["Message"]))
        if "detail" in event:  # EventBridge, which unlike S3 itself does not encode keys
            is_event_bridge = event["detail-type"] == "Object Created"
            return [_object(event["detail"], event["time"], str)] if is_event_bridge else []
        objects = []
        for record in event["Records"]:
            if "body" in record or "Sns" in record:
                objects += landed(
                    json.loads(record["body"] if "body" in record else record["Sns"]["Message"])
                )
            elif "ObjectCreated" in record["eventName"]:
                objects.append(_object(record["s3"], record["eventTime"], unquote_plus))
        return objects
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise EventError(f"no S3 event: {type(error).__name__} {error}") from None


def _object(details: Mapping[str, Any], event_time: str, decoded: Callable[[str], str]) -> Landed:
    thing = details["object"]
    # the shorter of two sequencers is to be filled up with zeros on the right (AWS); without one, the time must do
    order = (thing.get("sequencer") or re.sub(r"\D", "", event_time)).lower().ljust(32, "0")
    version = thing.get("versionId") or thing.get("version-id")
    return Landed(f"{details['bucket']['name']}/{decoded(thing['key'])}", order, version, event_time)
