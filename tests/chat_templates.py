"""Chat templates of the kinds that checkpoints have, written for the tests."""

from __future__ import annotations

PLAIN = (
    "{{ bos_token }}{% for m in messages %}<turn>{{ m.role }}\n{{ m.content }}<eos>\n"
    "{% endfor %}{% if add_generation_prompt %}<turn>model\n{% endif %}"
)

# As trainers mark what the model has to learn.
GENERATION = """{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<turn>assistant\\n' }}{% generation %}{{ message.content + '<eos>' }}
        {%- set seen = true %}{% endgeneration %}
        {%- if seen is defined %}{{ 'leaked' }}{% endif %}
    {%- else %}
        {{- '<turn>' + message.role + '\\n' + message.content + '<eos>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<turn>assistant\\n' }}{% endif %}"""

# Tools, thoughts that are taken out of what was said before, a switch for them.
THINKING = """{%- set ns = namespace(last=-1) %}
{%- for m in messages %}
    {%- if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- if tools is not none and tools %}
    {{- '<turn>system\\n# Tools' }}
    {%- for tool in tools %}{{ '\\n' + tool | tojson }}{% endfor %}{{ '<eos>\\n' }}
{%- endif %}
{%- if documents is none %}{{ '(none)' }}{% else %}{{ documents | tojson(indent=1) }}{% endif %}
{%- for m in messages %}
    {%- set content = m.content if m.content is string else '' %}
    {%- if m.role == 'assistant' and '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<turn>' + m.role + '\\n' }}
    {%- if m.reasoning_content is defined and loop.index0 > ns.last %}
        {{- '<think>' + m.reasoning_content + '</think>' }}
    {%- endif %}
    {{- content }}
    {%- for call in m.tool_calls or [] %}
        {{- '<tool>' + call.function.name }}
        {{- call.function.arguments | tojson(false, none, [',', ':']) }}
    {%- endfor %}
    {{- '<eos>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<turn>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n' }}
    {%- endif %}
{%- endif %}"""

# A date, a macro, a refusal, and sorted JSON in every form.
STRICT = """{%- macro turn(role, text) -%}<turn>{{ role }}
{{ text | trim }}<eos>
{% endmacro -%}
{{- bos_token }}{{ strftime_now('%d %B %Y %H:%M') }}
{% for m in messages %}
    {%- if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{% continue %}{% endif %}
    {%- if m.content is iterable and m.content is not string %}
        {%- for part in m.content %}{{ part.text | tojson(ensure_ascii=true) }}{% endfor %}
    {%- else %}{{ turn(m.role, m.content) }}{% endif %}
    {{- m | tojson(sort_keys=true, indent=2, separators=(',', ' : ')) }}
    {{- dict(a=1) | items | list }}{{ pad_token is defined }}{{ mask_token is defined }}
{%- endfor %}
{{- '%05.1f|%s' % (3.14159, 'x') }}{{ '{:>4}'.format(7) }}{{ 'abc' | center(9) | indent(3) }}
{%- if add_generation_prompt %}<turn>model
{% endif %}"""

TEMPLATES = {
    "plain": PLAIN,
    "generation": GENERATION,
    "thinking": THINKING,
    "strict": STRICT,
    "broken": "{% if %}",
    "hostile": "{{ ''.__class__.__mro__ }}",
    "underscores": "{% set ns = namespace(_x=1) %}{{ ns._x }}",
}
