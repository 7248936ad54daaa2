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

# What data can tell: who speaks first if nobody does, messages in each other, thoughts.
OWN_TURNS = """{%- if messages[0].role != 'system' %}
    {{- '<turn>system\\nYou are kind.<eos>\\n' }}
{%- endif %}
{%- for m in messages %}{{ '<turn>' + m.role + '\\n' + m.content + '<eos>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<turn>assistant\\n' }}{% endif %}"""

_ALTERNATING = """{%- for m in rest %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('user and assistant take turns') }}
    {%- endif %}"""

MERGED = (
    """{{ bos_token }}
{%- if messages[0].role == 'system' %}
    {%- set first = messages[0].content + '\\n\\n' %}{% set rest = messages[1:] %}
{%- else %}
    {%- set first = '' %}{% set rest = messages %}
{%- endif %}"""
    + _ALTERNATING
    + """
    {{- '<start_of_turn>' + ('model' if m.role == 'assistant' else 'user') + '\\n' }}
    {{- (first if loop.first else '') + m.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""
)

# The two texts are trimmed as one, so an empty message takes the line break with it.
MERGED_AND_TRIMMED = (
    """{%- if messages[0].role == 'system' %}
    {%- set first = '<<SYS>>' + messages[0].content + '<</SYS>>\\n' %}
    {%- set rest = messages[1:] %}
{%- else %}
    {%- set first = '' %}{% set rest = messages %}
{%- endif %}"""
    + _ALTERNATING
    + """
    {%- if m.role == 'user' %}
        {{- bos_token + '[INST] ' + ((first if loop.first else '') + m.content) | trim }}
        {{- ' [/INST]' }}
    {%- else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}
{%- endfor %}"""
)

REFUSED = """{%- if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}
{%- set rest = messages %}{{ bos_token }}""" + MERGED.partition("{%- endif %}")[2].replace(
    "first if loop.first else ''", "''"
)

# The system's message stands in the last turn of the user.
MOVED = """{%- set system = messages[0].content if messages[0].role == 'system' else none %}
{%- set rest = messages[1:] if system is not none else messages %}
{{- bos_token }}
{%- for m in rest %}
    {%- if m.role == 'user' %}
        {{- '[INST] ' }}
        {%- if loop.last and system is not none %}{{ system + '\\n\\n' }}{% endif %}
        {{- m.content.strip() + ' [/INST]' }}
    {%- elif m.role == 'assistant' %}{{ ' ' + m.content.strip() + eos_token }}
    {%- else %}{{ raise_exception('no such role here') }}{% endif %}
{%- endfor %}"""

CHANNELS = """{%- macro said(text) %}
    {%- set ns = namespace(left='') %}
    {%- for part in text.split('<channel|>') %}
        {%- set ns.left = ns.left + part.split('<|channel>')[0] %}
    {%- endfor %}
    {{- ns.left | trim }}
{%- endmacro %}
{{- bos_token }}
{%- set rest = messages %}
{%- if enable_thinking or messages[0].role == 'system' %}
    {{- '<|turn>system\\n' + ('<|think|>' if enable_thinking else '') }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content | trim }}{% set rest = messages[1:] %}
    {%- endif %}
    {{- '<turn|>\\n' }}
{%- endif %}
{%- for m in rest %}
    {{- '<|turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}
    {{- said(m.content) if m.role == 'assistant' else m.content | trim }}{{ '<turn|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|turn>model\\n' }}
    {%- if not enable_thinking %}{{ '<|channel>thought\\n<channel|>' }}{% endif %}
{%- endif %}"""

FORMATS = {
    "plain": PLAIN,
    "generation": GENERATION,
    "own turns": OWN_TURNS,
    "merged": MERGED,
    "merged and trimmed": MERGED_AND_TRIMMED,
    "refused": REFUSED,
    "moved": MOVED,
    "thoughts": THINKING,
    "channels": CHANNELS,
}

# What data cannot tell, and the reason.
NO_FORMATS = {
    "date": ("{{ strftime_now('%d %B') }}" + PLAIN, "it says what day it is"),
    "switch in a text": (
        "{% for m in messages %}<turn>{{ m.role }}{{ m.content }}"
        "{{ '/no' if not m.content.endswith('/no') }}{% endfor %}<turn>",
        "of the messages .* it makes '<turn>.*' from character .* on, and its parts make '/no",
    ),
    "capitals": (PLAIN.replace("m.content", "m.content | upper"), "it changes the texts of"),
    "counts": (PLAIN.replace("{{ m.role }}", "{{ m.role ~ loop.length }}"), "of the messages user"),
    "broken": ("{% if %}", "no plain form for user and assistant in turn .the chat template can"),
    "long": ("x" * 70000 + PLAIN, "its parts have no place in a manifest .Expected `str`"),
    "half a character": (
        "{{ '\\ud800' }}" + PLAIN,
        "its parts have no place in a manifest .*surrogates not allowed",
    ),
}
