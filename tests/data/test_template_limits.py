"""Chat templates end: within steps, time and size."""

import pytest

from train.data.template import template_renderer
from train.runtime.errors import UserError

MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a b"}]
TOO_MUCH = {
    "loops in loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a loop that sets": "{% for a in range(9999) %}{% for b in range(9999) %}{% set c = a %}{% endfor %}{% endfor %}",
    "macros that branch": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    "a text that doubles": (
        "{% set s = namespace(x='ab') %}{% for i in range(60) %}{% set s.x = s.x ~ s.x %}{% endfor %}{{ s.x }}"
    ),
    "a text that is added": (
        "{% set s = namespace(x='ab') %}{% for i in range(60) %}{% set s.x = s.x + s.x %}{% endfor %}"
    ),
    "output that grows": "{% for i in range(99999) %}{{ 'ab' * 99999 }}{% endfor %}",
    "a long text": "{{ 'a' * 10 ** 10 }}",
    "a long list": "{{ [0] * 10 ** 10 }}",
    "a large number": "{{ 9 ** 9999999 }}",
    "a width": "{{ 'a'.ljust(10000000000) }}",
    "a width of a filter": "{{ 'a' | center(10000000000) }}",
    "a width of a format": "{{ '%9999999999d' % 1 }}",
    "a width of a method": "{{ '{:9999999999d}'.format(1) }}",
    "replacements": "{{ ('a' * 99999) | replace('a', 'a' * 99999) }}",
    "replacements by a method": "{{ ('a' * 99999).replace('a', 'a' * 99999) }}",
    "joined": "{{ range(99999) | list | join('a' * 99999) }}",
    "a macro that never ends": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
}


@pytest.mark.parametrize("name", TOO_MUCH)
def test_a_template_that_takes_too_much_is_told(name):
    with pytest.raises(UserError, match="the chat template of DIR fails on these messages"):
        template_renderer(TOO_MUCH[name], {}, "DIR")(MESSAGES)


@pytest.mark.parametrize(("template", "text"), [
    ("{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ ',' if not loop.last }}{% endfor %}", "1/2,2/2"),
    ("{% for m in messages if m.role == 'user' %}{{ m.content ~ '!' ~ loop.first }}{% else %}-{% endfor %}", "q!True"),
    ("{% for m in [] %}{% else %}none{% endfor %}", "none"),
    ("{% for a in [[1, [2]]] recursive %}{{ a if a is number else loop(a) }}{% endfor %}", "12"),
    ("{{ messages | map(attribute='content') | join(', ') | replace('q', 'r') }}{{ '=' * 3 }}", "r, a b==="),
    ("{{ messages[0] | tojson(indent=1) }}", '{\n "role": "user",\n "content": "q"\n}'),
    ("{% for m in messages %}{{ loop.previtem.role if loop.previtem else '-' }}{{ loop.changed(m.role) }}{% endfor %}",
     "-TrueuserTrue"),
])  # fmt: skip
def test_a_template_in_bounds_is_rendered_as_without_them(template, text):
    assert template_renderer(template, {}, "DIR")(MESSAGES) == text
