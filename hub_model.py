"""The old place of `empathic.hub.models`, kept for one release."""

from .hub.models import *  # noqa: F403
