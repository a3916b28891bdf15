"""A conversation with a model, in the runtime that its export was verified with."""

from acip_export.chat.model import ChatModel, open_chat
from acip_export.chat.protocol import Answer, Settings

__all__ = ["Answer", "ChatModel", "Settings", "open_chat"]
