"""What may be a context, and what may fill a template: every wrong form is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.contexts import parse_wish
from proxy.errors import RequestRefused
from proxy.placeholders import constant_messages, constant_text, fill, variables_of


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "exactly one of text, messages and template"),
        ({"text": "a", "template": "b"}, "exactly one of"),
        ({"text": ""}, "text must be a text, and not empty"),
        ({"text": ["a"]}, "text must be a text"),
        ({"messages": "a"}, "messages must be a list of messages"),
        ({"messages": [{"content": "a"}]}, "messages must be a list of messages"),
        ({"template": 7}, "template must be a text or a list"),
        ({"text": "a", "ttl": 7}, "unknown field 'ttl'; did you mean ttl_s?"),
        ({"text": "a", "ttl_s": 0}, "ttl_s must be a number of seconds above 0"),
        ({"text": "a", "ttl_s": True}, "ttl_s must be a number"),
        ({"text": "a", "pin": "yes"}, "pin must be true or false"),
        ({"text": "a", "name": ""}, "name must be 1 to 128 printable"),
        ({"text": "a", "name": "x\n"}, "name must be 1 to 128 printable"),
        ({"text": "a", "endpoint": "embeddings"}, 'endpoint must be "chat" or "completion"'),
        ({"messages": [{"role": "user"}], "endpoint": "completion"}, "messages are computed for chats only"),
        ({"text": "a", "role": "assistant"}, 'role must be "system" or "user"'),
        ({"text": "a", "tools": [{}]}, "tools is a field of chats"),
        ({"text": "\ud800"}, "plain JSON in Unicode"),
    ],
)
def test_what_cannot_be_a_context_names_the_remedy(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestRefused) as refused:
        parse_wish(fields)
    assert (refused.value.status, said in str(refused.value)) == (400, True), str(refused.value)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({}, "missing: who, what"),
        ({"who": "a"}, "missing: what"),
        ({"who": "a", "what": "b", "when": "c"}, "unknown: when"),
        ({"who": "a", "what": 7}, "variable what must be a string, not int"),
        ("who", "must be an object of strings"),
    ],
)
def test_wrong_variables_are_named(variables: object, said: str) -> None:
    with pytest.raises(RequestRefused, match=said):
        fill("{{who}} {{ what }}", variables)


TEXTS = st.lists(
    st.one_of(st.text(alphabet="ab {}\n", max_size=6), st.sampled_from(["{{x}}", "{{ y }}", "{{z}}"]))
).map("".join)


@given(TEXTS, st.fixed_dictionaries({name: st.text(alphabet="{}xyz", max_size=9) for name in "xyz"}))
def test_a_filled_text_begins_with_what_is_computed_ahead(template: str, values: dict[str, str]) -> None:
    names = variables_of(template)
    filled = fill(template, {name: values.get(name, "value") for name in names})
    assert isinstance(filled, str)
    assert filled.startswith(constant_text(template))
    assert bool(names) == (constant_text(template) != template)


@given(st.lists(st.builds(lambda text: {"role": "user", "content": text}, TEXTS), max_size=4))
def test_filled_messages_begin_with_the_messages_that_are_computed_ahead(template: list[dict[str, Any]]) -> None:
    filled = fill(template, dict.fromkeys(variables_of(template), "value"))
    constant = constant_messages(template)
    for index, message in enumerate(constant):
        is_last = index == len(constant) - 1
        content = filled[index]["content"]  # type: ignore[index]
        assert content.startswith(message["content"]) if is_last else content == message["content"]
