"""Chat templates and the ids of conversations, against transformers."""

from helpers import AWKWARD
import pytest
import transformers

from matformer_jax.formats import sources
from matformer_jax.serving import chat

TALK = [
  {"role": "system", "content": "Be brief."},
  {"role": "user", "content": "  What is 2 + 2?\n"},
  {"role": "assistant", "content": "4"},
  {"role": "user", "content": "Sure?"},
]
# What templates of public models make use of.
TEMPLATES = {
  "whitespace control": "{% for m in messages %}\n"
  "  {%- if loop.first %}{{ bos_token }}{% endif %}\n"
  "    {{ m.role }}: {{ m['content'] | trim }}\n{% endfor %}\n",
  "namespace and slices": "{% set ns = namespace(n=0) %}{% for m in messages[1:] %}"
  "{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ m.content[:3] }}{% endfor %}{{ messages[-1].role }}",
  "loop controls": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
  "{{ m.content }}{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}",
  "tojson": "{{ messages | tojson }}|{{ messages[0] | tojson(indent=2) }}|{{ 'é<&>' | tojson }}",
  "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
  "{{ m.content }}{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
  "{% endfor %}",
  "date and tools": "{{ strftime_now('%Y') }}{% if tools %}tools{% endif %}"
  "{% if tools is not none %}t{% endif %}{% if documents %}d{% endif %}{{ add_generation_prompt }}",
}


@pytest.fixture(scope="module")
def theirs(smollm2_file):
  return transformers.AutoTokenizer.from_pretrained(
    smollm2_file.parent, gguf_file=smollm2_file.name
  )


@pytest.fixture(scope="module")
def ours(smollm2_file):
  return sources.open_source(smollm2_file).tokenizer()


def test_ids_of_smollm2(theirs, ours):
  template = chat.open_template(ours)
  source = ours.config["chat_template"]
  # Where they agree on the text alone: transformers does not read how a GGUF file splits digits,
  # and makes special tokens of what spells one.
  words = [t for t in AWKWARD if t.strip() and ours.encode(t) == theirs(t).input_ids]
  assert len(words) > len(AWKWARD) / 2
  for talk in (TALK, TALK[1:], *([{"role": "user", "content": w}] for w in words)):
    want = theirs.apply_chat_template(
      talk, chat_template=source, add_generation_prompt=True, return_dict=False
    )
    assert template.prompt(talk) == list(want)


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_of_templates(theirs, ours, name):
  want = theirs.apply_chat_template(
    TALK, chat_template=TEMPLATES[name], add_generation_prompt=True, tokenize=False
  )
  assert chat.ChatTemplate(TEMPLATES[name], ours).render(TALK) == want
