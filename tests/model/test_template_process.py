"""The process that chat templates are rendered in."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import pytest

from acip_export.model.template_process import TemplateProcess

ENDLESS = "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}"


def request(template: str) -> dict[str, Any]:
    return {"template": template, "tokens": {}, "messages": [], "answer": False}


def test_an_interrupted_template_is_not_the_answer_to_the_next() -> None:
    """Ctrl-C stops an answer, and the conversation goes on; nothing goes on computing behind it."""
    process = TemplateProcess()
    assert process.render(request("first")) == "first"
    child = process._child
    with pytest.raises(KeyboardInterrupt):
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        process.render(request(ENDLESS))
    assert child is not None and child.poll() is not None
    assert process.render(request("second")) == "second"
    process.close()
