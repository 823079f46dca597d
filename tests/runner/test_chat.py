"""Chat templates in their published forms, the sandbox, and where a template is found.

The templates are short ones of our own that have the structure of the published ones: V3, R1, V3.1, V2.
"""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import pytest

from manifests.auxiliary import Auxiliary
from manifests.errors import ManifestError, ToolkitError
from manifests.folder import LocalFolder
from runner.chat import ChatTemplate

BOS, EOS = "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"
USER, ASSISTANT = "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"

V3 = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    "{% set ns = namespace(system_prompt='') %}"
    "{%- for message in messages %}{%- if message['role'] == 'system' %}"
    "{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}"
    "{{bos_token}}{{ns.system_prompt}}"
    "{%- for message in messages %}"
    "{%- if message['role'] == 'user' %}{{'" + USER + "' + message['content']}}{%- endif %}"
    "{%- if message['role'] == 'assistant' and message['content'] is not none %}"
    "{{'" + ASSISTANT + "' + message['content'] + '" + EOS + "'}}{%- endif %}"
    "{%- endfor -%}"
    "{% if add_generation_prompt %}{{'" + ASSISTANT + "'}}{% endif %}"
)

R1 = V3.replace(
    "{{'" + ASSISTANT + "' + message['content'] + '" + EOS + "'}}",
    "{% set content = message['content'] %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{'" + ASSISTANT + "' + content + '" + EOS + "'}}",
).replace("{{'" + ASSISTANT + "'}}", "{{'" + ASSISTANT + "<think>\\n'}}")

V31 = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    "{% if not thinking is defined %}{% set thinking = false %}{% endif %}"
    "{% set ns = namespace(system_prompt='', is_first_sp=true, is_last_user=false) %}"
    "{%- for message in messages %}{%- if message['role'] == 'system' %}"
    "{%- if ns.is_first_sp %}{% set ns.system_prompt = message['content'] %}{% set ns.is_first_sp = false %}"
    "{%- else %}{% set ns.system_prompt = ns.system_prompt + '\\n\\n' + message['content'] %}{%- endif %}"
    "{%- endif %}{%- endfor %}"
    "{{ bos_token }}{{ ns.system_prompt }}"
    "{%- for message in messages %}"
    "{%- if message['role'] == 'user' %}{%- set ns.is_last_user = true -%}"
    "{{'" + USER + "' + message['content']}}{%- endif %}"
    "{%- if message['role'] == 'assistant' and"
    " (message['tool_calls'] is not defined or message['tool_calls'] is none) %}"
    "{%- if ns.is_last_user %}{{'" + ASSISTANT + "'}}"
    "{%- if message['prefix'] is defined and message['prefix'] and thinking %}{{'<think>'}}"
    "{%- else %}{{'</think>'}}{%- endif %}{%- endif %}"
    "{%- set ns.is_last_user = false -%}"
    "{%- set content = message['content'] -%}"
    "{%- if '</think>' in content %}{%- set content = content.split('</think>', 1)[1] -%}{%- endif %}"
    "{{content + '" + EOS + "'}}{%- endif %}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt and ns.is_last_user %}{{'" + ASSISTANT + "'}}"
    "{%- if not thinking %}{{'</think>'}}{%- else %}{{'<think>'}}{%- endif %}{% endif %}"
)

V2 = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token }}"
    "{% elif message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

ONE = [{"role": "user", "content": "Hi"}]
THREE = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "a thought</think>Hello."},
    {"role": "user", "content": "Why?"},
]


def render(template: str, messages: list[dict[str, str]], *, thinking: bool = False) -> str:
    return ChatTemplate(template, source="test").render(messages, bos_token=BOS, eos_token=EOS, thinking=thinking)


# --- published forms ---


def test_v3() -> None:
    assert render(V3, ONE) == f"{BOS}{USER}Hi{ASSISTANT}"
    assert render(V3, THREE) == (f"{BOS}Be brief.{USER}Hi{ASSISTANT}a thought</think>Hello.{EOS}{USER}Why?{ASSISTANT}")


def test_r1_thinks_and_forgets_earlier_thoughts() -> None:
    assert render(R1, ONE) == f"{BOS}{USER}Hi{ASSISTANT}<think>\n"
    assert render(R1, THREE) == f"{BOS}Be brief.{USER}Hi{ASSISTANT}Hello.{EOS}{USER}Why?{ASSISTANT}<think>\n"


def test_v31_without_thinking() -> None:
    assert render(V31, ONE) == f"{BOS}{USER}Hi{ASSISTANT}</think>"
    assert render(V31, THREE) == (f"{BOS}Be brief.{USER}Hi{ASSISTANT}</think>Hello.{EOS}{USER}Why?{ASSISTANT}</think>")


def test_v31_with_thinking() -> None:
    assert render(V31, ONE, thinking=True) == f"{BOS}{USER}Hi{ASSISTANT}<think>"
    assert render(V31, THREE, thinking=True) == (
        f"{BOS}Be brief.{USER}Hi{ASSISTANT}</think>Hello.{EOS}{USER}Why?{ASSISTANT}<think>"
    )


def test_v31_joins_system_messages() -> None:
    messages = [{"role": "system", "content": "One."}, {"role": "system", "content": "Two."}, *ONE]
    assert render(V31, messages) == f"{BOS}One.\n\nTwo.{USER}Hi{ASSISTANT}</think>"


def test_v2_leaves_no_blank_at_the_end() -> None:
    assert render(V2, ONE) == f"{BOS}User: Hi\n\nAssistant:"
    messages = [*THREE[:2], {"role": "assistant", "content": "Hello."}, THREE[3]]
    assert render(V2, messages) == (f"{BOS}Be brief.\n\nUser: Hi\n\nAssistant: Hello.{EOS}User: Why?\n\nAssistant:")


def test_the_thinking_switch_is_known_to_v31_only() -> None:
    knows = [ChatTemplate(template, source="test").has_thinking for template in (V3, R1, V31, V2)]
    assert knows == [False, False, True, False]


# --- what templates may use ---


def test_blocks_leave_no_blank_lines() -> None:
    template = "a\n  {% if true %}\nb\n  {% endif %}\nc"
    assert render(template, ONE) == "a\nb\nc"


def test_tojson_keeps_letters_and_signs() -> None:
    assert render("{{ {'a': '\u00e9<&>', 'b': 1} | tojson }}", ONE) == '{"a": "\u00e9<&>", "b": 1}'
    assert render("{{ [1] | tojson(indent=2) }}", ONE) == "[\n  1\n]"


def test_strftime_now_gives_today() -> None:
    before = datetime.now().strftime("%Y-%m-%d")
    shown = render("{{ strftime_now('%Y-%m-%d') }}", ONE)
    assert shown in (before, datetime.now().strftime("%Y-%m-%d"))


def test_loop_controls_work() -> None:
    assert render("{% for m in messages %}{% break %}{% endfor %}ok", ONE) == "ok"


def test_messages_cannot_be_changed_by_the_template() -> None:
    messages = [{"role": "user", "content": "Hi"}]
    with pytest.raises(ManifestError, match="may not use"):
        render("{{ messages[0].update({'content': 'x'}) }}", messages)
    assert messages == [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__code__.co_consts }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ messages.append(1) }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{{ (''|attr('__class__')).__mro__ }}",
    ],
)
def test_the_sandbox_holds(attack: str) -> None:
    with pytest.raises(ManifestError, match="may not use"):
        render(attack, ONE)


@pytest.mark.parametrize("reach", ["{% include '/etc/passwd' %}", "{% import 'os' as os %}", "{{ open('x') }}"])
def test_files_and_modules_are_out_of_reach(reach: str) -> None:
    with pytest.raises(ManifestError, match="fails"):
        render(reach, ONE)


# --- failures ---


def test_a_template_may_refuse_a_conversation() -> None:
    with pytest.raises(ToolkitError, match="refuses this conversation: roles must alternate") as caught:
        render("{{ raise_exception('roles must alternate') }}", ONE)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    "template", ["{{ 'a' + none }}", "{{ 1 // 0 }}", "{{ missing.attribute }}", "{{ range(10**9) | list }}"]
)
def test_a_failing_template_is_one_sentence(template: str) -> None:
    with pytest.raises(ManifestError, match=r"^test fails: "):
        render(template, ONE)


@pytest.mark.parametrize("template", ["{% if %}", "{{", "{% nonsense %}"])
def test_what_is_no_template_is_refused(template: str) -> None:
    with pytest.raises(ManifestError, match="not a valid chat template"):
        ChatTemplate(template, source="test")


# --- where it is found ---


def found(folder: Path, config: dict[str, object]) -> str | None:
    template = ChatTemplate.find(Auxiliary(LocalFolder(folder)), config)
    return None if template is None else template.render(ONE, bos_token="", eos_token="")


def test_no_template(tmp_path: Path) -> None:
    assert found(tmp_path, {}) is None
    assert found(tmp_path, {"chat_template": None}) is None


def test_a_template_in_the_tokenizer_config(tmp_path: Path) -> None:
    assert found(tmp_path, {"chat_template": "plain"}) == "plain"


def test_the_default_of_several(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    assert found(tmp_path, {"chat_template": named}) == "plain"
    with pytest.raises(ManifestError, match=r"no template is named 'default' \(there are: 'tool_use'"):
        found(tmp_path, {"chat_template": named[:1]})


def test_the_file_wins(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("of the file", encoding="utf-8")
    assert found(tmp_path, {"chat_template": "plain"}) == "of the file"


@pytest.mark.parametrize("value", [3, {"default": "x"}, [{"name": "default", "template": 3}]])
def test_what_is_no_text_is_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(ManifestError, match="must be a text or a list"):
        found(tmp_path, {"chat_template": json.loads(json.dumps(value))})


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"ab\xff")
    with pytest.raises(ManifestError, match="not UTF-8 at byte 2"):
        found(tmp_path, {})


def test_a_huge_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"a" * 1_000_001)
    with pytest.raises(ManifestError, match="larger than"):
        found(tmp_path, {})
