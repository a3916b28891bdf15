"""A chat template as Ollama writes them: Go's templates instead of Jinja.

Ollama recognises the templates of known models and shows every other model its prompts bare. What a template puts
around messages is found by rendering a conversation of known words, and taken only if longer ones come out the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from acip_export.errors import InputError
from acip_export.model.chat_template import ChatTemplate, Message

_SYSTEM, _ASKED, _SAID = "Brief0 words.", ("Asks1 one.", "Asks2 two.", "Asks3 three."), ("Says1 one.", "Says2 two.")


@dataclass(frozen=True)
class _Turns:
    """What stands before a conversation without a system message, after its questions, and after its answers.

    Attributes:
        system: what stands before and after a system message; ``None``: the template refuses them.
    """

    opening: str
    asked: str
    answered: str
    system: tuple[str, str] | None

    @property
    def texts(self) -> tuple[str, ...]:
        """All that is put around messages."""
        return (self.opening, self.asked, self.answered, *(self.system or ()))

    def write(self, messages: Sequence[Message]) -> str:
        """Write as :meth:`go` does."""
        first = messages[0]["content"] if messages[0]["role"] == "system" else ""
        text = self.opening if not first or self.system is None else first.join(self.system)
        after = {"user": self.asked, "assistant": self.answered}
        return text + "".join(m["content"] + after[m["role"]] for m in messages if m["role"] in after)

    def go(self) -> str:
        """Return the template; an answer that is to be continued has nothing after it."""
        opening = self.opening
        if self.system is not None:
            before, after = self.system
            opening = f"{{{{ if .System }}}}{before}{{{{ .System }}}}{after}{{{{ else }}}}{opening}{{{{ end }}}}"
        asked = '{{ if eq .Role "user" }}{{ .Content }}' + self.asked
        answered = '{{ else if eq .Role "assistant" }}{{ .Content }}{{ if not $last }}' + self.answered + "{{ end }}"
        last = "{{ $last := eq (len (slice $.Messages $index)) 1 }}"
        return f"{opening}{{{{ range $index, $_ := .Messages }}}}{last}{asked}{answered}{{{{ end }}}}{{{{ end }}}}"


def ollama_template(template: str) -> str | None:
    """Return the same as a Go template; ``None`` where a conversation would be written differently."""
    # Ollama itself puts the beginning-of-text token before a prompt.
    chat = ChatTemplate(template, {"bos_token": ""})
    try:
        turns = _turns(chat)
        if turns is None or any(mark in text for text in turns.texts for mark in ("{{", "}}", '"')):
            return None
        for system in ("", _SYSTEM) if turns.system is not None else ("",):
            messages = _conversation(3, system)
            if turns.write(messages) != chat.render(messages):
                return None
    except InputError:
        return None
    return turns.go()


def _conversation(questions: int, system: str = "") -> list[Message]:
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for number in range(questions):
        messages.append({"role": "user", "content": _ASKED[number]})
        if number < questions - 1:
            messages.append({"role": "assistant", "content": _SAID[number]})
    return messages


def _turns(chat: ChatTemplate) -> _Turns | None:
    pieces = _between(chat.render(_conversation(2)), (_ASKED[0], _SAID[0], _ASKED[1]))
    if pieces is None or pieces[1] != pieces[3]:
        return None
    try:
        with_system = _between(chat.render(_conversation(1, _SYSTEM)), (_SYSTEM, _ASKED[0]))
    except InputError:
        with_system = ()
    if with_system is None:
        return None
    opening, asked, answered, _ = pieces
    return _Turns(opening, asked, answered, (with_system[0], with_system[1]) if with_system else None)


def _between(text: str, words: Sequence[str]) -> tuple[str, ...] | None:
    """Return what stands before, between and after ``words``; ``None``: not each of them once and in this order."""
    places = [text.find(word) for word in words]
    if any(text.count(word) != 1 for word in words) or sorted(places) != places:
        return None
    begins = [0, *(place + len(word) for place, word in zip(places, words, strict=True))]
    return tuple(text[begin:end] for begin, end in zip(begins, [*places, len(text)], strict=True))
