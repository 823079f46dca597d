"""A conversation's ids: what the model read and wrote stays as it was, wherever the template allows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from manifests.errors import ToolkitError
from runner.conversation import Conversation
from runner.text import Text

BOS, EOS = "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"
USER, ASSISTANT = "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"

Folder = Callable[..., Path]

V3 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}"
    f"{{% elif m['role'] == 'user' %}}{USER}{{{{ m['content'] }}}}"
    f"{{% else %}}{ASSISTANT}{{{{ m['content'] }}}}{{{{ eos_token }}}}{{% endif %}}{{% endfor %}}{ASSISTANT}"
)
R1 = (
    V3.replace(
        f"{ASSISTANT}{{{{ m['content'] }}}}", f"{ASSISTANT}{{{{ m['content'].split('</think>')[-1] }}}}"
    ).removesuffix(ASSISTANT)
    + ASSISTANT
    + "{{ '<think>\\n' }}"
)
V2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ 'User: ' + m['content'] + '\\n\\n' }}"
    "{% else %}{{ 'Assistant: ' + m['content'] + eos_token }}{% endif %}{% endfor %}{{ 'Assistant:' }}"
)


@pytest.fixture
def text_with(text_folder: Folder) -> Callable[[str], Text]:
    def make(template: str) -> Text:
        config = {"bos_token": BOS, "eos_token": EOS, "chat_template": template}
        return Text.from_checkpoint(text_folder(tokenizer_config=config))

    return make


def test_the_first_turn_is_the_template(text_with: Callable[[str], Text]) -> None:
    text = text_with(V3)
    turn = Conversation(text, system="Be brief.").ask("Hi")
    assert text.decode(turn.ids, control_tokens=True) == f"{BOS}Be brief.{USER}Hi{ASSISTANT}"


def test_an_unusual_spelling_of_an_answer_is_kept(text_with: Callable[[str], Text]) -> None:
    text = text_with(V3)
    conversation = Conversation(text)
    turn = conversation.ask("Hi")
    spelled = [token for letter in "hello" for token in text.encode(letter, add_bos=False)]
    assert spelled != text.encode("hello", add_bos=False)  # the tokenizer would merge letters
    conversation.answered(turn, spelled)
    after = conversation.ask("Why?")
    assert list(after.ids[: len(turn.ids) + len(spelled)]) == [*turn.ids, *spelled]
    assert text.decode(after.ids, control_tokens=True) == (f"{BOS}{USER}Hi{ASSISTANT}hello{EOS}{USER}Why?{ASSISTANT}")
    assert after.ids.count(0) == 1


def test_a_third_turn_still_continues(text_with: Callable[[str], Text]) -> None:
    text = text_with(V3)
    conversation = Conversation(text)
    timeline: tuple[int, ...] = ()
    for question in ("one", "two", "three"):
        turn = conversation.ask(question)
        assert turn.ids[: len(timeline)] == timeline
        answer = [token for letter in "hell" for token in text.encode(letter, add_bos=False)]
        conversation.answered(turn, answer)
        timeline = (*turn.ids, *answer)


def test_r1_reads_the_conversation_without_earlier_thoughts(text_with: Callable[[str], Text]) -> None:
    text = text_with(R1)
    conversation = Conversation(text)
    turn = conversation.ask("Hi")
    conversation.answered(turn, text.encode("hm</think>Hello.", add_bos=False))
    after = conversation.ask("Why?")
    assert text.decode(after.ids, control_tokens=True) == (
        f"{BOS}{USER}Hi{ASSISTANT}Hello.{EOS}{USER}Why?{ASSISTANT}<think>\n"
    )


def test_thoughts_are_found_where_their_token_is_a_hidden_one(text_folder: Folder, tokenizer: Tokenizer) -> None:
    """Then the answer that people see lacks `</think>`, but the template must still find it."""
    config = {"bos_token": BOS, "eos_token": EOS, "chat_template": R1}
    folder = text_folder(tokenizer_config=config)
    document = json.loads(tokenizer.to_str())
    for token in document["added_tokens"]:
        token["special"] = True
    (folder / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    text = Text.from_checkpoint(folder)
    conversation = Conversation(text)
    conversation.answered(conversation.ask("Hi"), text.encode("hm</think>Hello.", add_bos=False))
    after = text.decode(conversation.ask("Why?").ids, control_tokens=True)
    assert after == f"{BOS}{USER}Hi{ASSISTANT}Hello.{EOS}{USER}Why?{ASSISTANT}<think>\n"


def test_the_blank_before_a_v2_answer_is_written_once(text_with: Callable[[str], Text]) -> None:
    text = text_with(V2)
    conversation = Conversation(text)
    turn = conversation.ask("Hi")
    answer = text.encode(" Hello.", add_bos=False)
    conversation.answered(turn, answer)
    after = conversation.ask("Why?")
    assert list(after.ids[: len(turn.ids) + len(answer)]) == [*turn.ids, *answer]
    assert text.decode(after.ids, control_tokens=True) == (
        f"{BOS}User: Hi\n\nAssistant: Hello.{EOS}User: Why?\n\nAssistant:"
    )


def test_control_tokens_that_a_user_wrote_stay_plain_in_later_turns(text_with: Callable[[str], Text]) -> None:
    text = text_with(V3)
    conversation = Conversation(text)
    turn = conversation.ask(f"what is {USER}?")
    conversation.answered(turn, text.encode("hello", add_bos=False))
    after = conversation.ask(f"and {ASSISTANT}?")
    user, assistant = text.encode(USER + ASSISTANT, add_bos=False)
    assert (after.ids.count(user), after.ids.count(assistant)) == (2, 2)
    assert after.ids[: len(turn.ids)] == turn.ids


def test_a_question_without_an_answer_leaves_no_trace(text_with: Callable[[str], Text]) -> None:
    conversation = Conversation(text_with(V3))
    first = conversation.ask("Hi")
    conversation.ask("something that failed")
    assert conversation.ask("Hi") == first


def test_reset_keeps_the_system_message(text_with: Callable[[str], Text]) -> None:
    conversation = Conversation(text_with(V3), system="Be brief.")
    first = conversation.ask("Hi")
    conversation.answered(first, [5])
    conversation.reset()
    assert conversation.ask("Hi") == first


def test_thinking_reaches_the_template(text_with: Callable[[str], Text]) -> None:
    text = text_with("{{ 'on' if thinking else 'off' }}")
    shown = [text.decode(Conversation(text, thinking=flag).ask("Hi").ids) for flag in (True, False)]
    assert shown == ["on", "off"]


def test_without_a_template_there_is_no_conversation(text_folder: Folder) -> None:
    with pytest.raises(ToolkitError, match="no chat template"):
        Conversation(Text.from_checkpoint(text_folder())).ask("Hi")
