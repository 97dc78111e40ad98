"""How a client's vectors travel in a run: which codec each way, what both sides keep, and the bytes.

Pure numpy and explicit state; neither Flower nor torch. ``ways`` reads the settings ``up`` and ``down``,
``frames`` is the down-link's format, ``public`` the server's side of it and ``received`` the client's,
``residual`` what error feedback carries on the client.
"""

from fedmask.channel.frames import Frame, payload_bytes, read_frame, write_frame
from fedmask.channel.public import Public, advance, frame_for, start_public, whole_frame
from fedmask.channel.received import Behind, Received, receive
from fedmask.channel.residual import Residual
from fedmask.channel.terms import Places, Step, Terms
from fedmask.channel.ways import Down, change_way, down_way, up_codec, value_bytes

__all__ = [
    "Behind",
    "Down",
    "Frame",
    "Places",
    "Public",
    "Received",
    "Residual",
    "Step",
    "Terms",
    "advance",
    "change_way",
    "down_way",
    "frame_for",
    "payload_bytes",
    "read_frame",
    "receive",
    "start_public",
    "up_codec",
    "value_bytes",
    "whole_frame",
    "write_frame",
]
