#!/usr/bin/env python3
"""Writes conformance/golden/tokenizer/*.json, the reference for the tokenizer and the chat templates.

    pip install transformers gguf jinja2 regex
    scripts/golden_tokenizer.py [MODEL.gguf]

Two references must agree on every text before anything is written: the `tokenizers` library (its regular expressions
run on Oniguruma here, on fancy-regex in Ampoule), set up as the models' published tokenizer.json files are, and a
plain byte-pair encoder below that shares no code with it. Conversations are rendered by transformers.
"""

import json
import pathlib
import sys

import regex
import transformers
from gguf import GGUFReader
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

ROOT = pathlib.Path(__file__).resolve().parent.parent
OUT = ROOT / "conformance" / "golden" / "tokenizer"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
TAIL = r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
HEAD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?"
PATTERNS = {
    "llama3": HEAD + r"\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+" + TAIL,
    "qwen2": HEAD + r"\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+" + TAIL,
    "qwen35": HEAD + r"[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+" + TAIL,
}

TEXTS = [
    "",
    " ",
    "  ",
    "\n",
    "\t",
    "a",
    "Hello, world!",
    "Hello world! 123",
    "The quick brown fox jumps over the lazy dog.",
    "it's we're I'll you've he'd I'm don't",
    "IT'S WE'RE I'LL YOU'VE HE'D I'M DON'T",
    "it\u2019s a curly apostrophe",
    "'s't're've'm'll'd",
    "\u017fet '\u017f",
    "0123456789",
    "3.14159 1,000,000 2024-02-29 12:34:56",
    "v1.2.3-rc4+build567",
    "x86_64 i386 utf8 sha256",
    "\u0661\u0662\u0663 \u00bd \u2163 \u00b2\u00b3",
    "  leading spaces",
    "trailing spaces  ",
    "a  b   c    d     e",
    "tabs\tand\t\ttabs",
    "line\nbreak\n\nparagraph\n\n\nend",
    "windows\r\nlines\r\n\r\n",
    "carriage\rreturn",
    " \n \n \n",
    "\n\n\n\n\n\n\n\n",
    "\t\t\t\tindented",
    "mixed \t \n\t whitespace \u00a0\u2003\u3000end",
    "\u0085next line \u2028 separator \u2029 paragraph",
    "\u200bzero\u200cwidth\u200djoiners\ufeff",
    "def f(x):\n    return x ** 2 + 1  # comment\n",
    "fn main() {\n\tprintln!(\"{:?}\", vec![1, 2, 3]);\n}\n",
    "for (int i = 0; i < n; ++i) { sum += a[i]; }",
    "SELECT * FROM t WHERE a >= 10 AND b <> 'x';",
    "<html><body class=\"a b\">&nbsp;</body></html>",
    "{\"key\": [1, 2.5, null, true], \"nested\": {\"a\": \"b\"}}",
    "https://example.com/path?query=1&other=%20#fragment",
    "C:\\Users\\name\\file.txt /usr/local/bin",
    "$ ls -la | grep '^d' > out.txt 2>&1",
    "a=b==c!=d===e->f=>g::h...i",
    "!@#$%^&*()_+-=[]{}|;':\",./<>?`~",
    "CamelCase snake_case kebab-case SCREAMING_CASE",
    "caf\u00e9 na\u00efve r\u00e9sum\u00e9 \u00fcber",
    "cafe\u0301 nai\u0308ve (decomposed)",
    "\u212b \ufb01 \u2460 (compatibility)",
    "Stra\u00dfe \u00c6r\u00f8sk\u00f8bing \u0141\u00f3d\u017a",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! \u042f \u0432 12 \u0440\u0430\u0437",
    "\u0393\u03b5\u03b9\u03ac \u03c3\u03bf\u03c5 \u03ba\u03cc\u03c3\u03bc\u03b5",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645\u060c \u0643\u064e\u064a\u0652\u0641\u064e \u062d\u0627\u0644\u064f\u0643\u064e\u061f",
    "\u05e9\u05c1\u05b8\u05dc\u05d5\u05b9\u05dd \u05e2\u05d5\u05dc\u05dd",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e \u0967\u0968\u0969",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e0a\u0e32\u0e27\u0e42\u0e25\u0e01",
    "\u4f60\u597d\uff0c\u4e16\u754c\uff01\u4eca\u5929\u662f2024\u5e74\u3002",
    "\u3053\u3093\u306b\u3061\u306f\u4e16\u754c \u30ab\u30bf\u30ab\u30ca \uff76\uff80\uff76\uff85",
    "\uc548\ub155\ud558\uc138\uc694 \uc138\uacc4 \u1112\u1161\u11ab",
    "\U00020000\U0002a6d6 rare ideographs",
    "\U0001f600\U0001f680\u2728 emoji",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 family, \U0001f44d\U0001f3fd thumb, \U0001f1e9\U0001f1ea flag, 1\ufe0f\u20e3 key",
    "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f tag flag",
    "\u2211\u222b\u221a\u03c0 \u2264 \u221e \u2200x\u2208\u211d",
    "\U0001d4d7\U0001d4ee\U0001d4f5\U0001d4f5\U0001d4f8 mathematical letters",
    "z\u0351\u036b\u0343\u036aa\u0322\u034el\u0323g\u031bo",
    "\u0000\u0001\u0004\u001f\u007f control characters",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<|endoftext|><|endoftext|> <|im_end|>",
    "text<|im_end|>text <|im_end |> <|im_en",
    "<repo_name>a/b<file_sep>src/main.rs<gh_stars>",
    "<|IM_END|> < |im_end| >",
    "\u0120hello \u010a \u00e9 (stand-ins in the text)",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "========================================",
    "- [ ] todo\n- [x] done\n\n> quote\n\n```rust\nlet x = 1;\n```\n",
    "| a | b |\n|---|---|\n| 1 | 2 |\n",
    "\\frac{a}{b} \\sum_{i=0}^{n} x_i^2",
    "Lorem ipsum dolor sit amet, consectetur adipiscing elit. " * 40,
    "word " * 300 + "\n" * 50 + "9" * 200,
]

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather <now> & \"later\" \u2014 it's f\u00fcr alle \u2603\n",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1, "default": 1.0}},
                "required": ["city"],
                "additionalProperties": False,
                "examples": [],
                "empty": {},
                "none": None,
                "small": 1e-7,
                "large": 1e20,
            },
        },
    },
    {"type": "function", "function": {"name": "clock", "parameters": {}}},
]
USER = {"role": "user", "content": "Hi there"}
SYSTEM = {"role": "system", "content": "  Be brief.\n"}
ANSWER = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello!"}
CALLS = {
    "role": "assistant",
    "content": "Let me look.",
    "thought": " I need the weather. ",
    "tool_calls": [
        {
            "type": "function",
            "function": {
                "name": "weather",
                "arguments": {"city": "K\u00f6ln", "days": 2, "exact": True, "at": [1, 2.0], "none": None, "where": {"a": "<b>"}},
            },
        },
        {"name": "clock", "arguments": "{\"unit\": \"s\"}"},
    ],
}
REPLIES = [{"role": "tool", "content": "12 \u00b0C"}, {"role": "tool", "content": [{"type": "text", "text": "noon"}]}]
PARTS = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}

CONVERSATIONS = [
    dict(messages=[USER]),
    dict(messages=[USER], add_generation_prompt=True),
    dict(messages=[SYSTEM, USER], add_generation_prompt=True),
    dict(messages=[SYSTEM, USER, ANSWER, {"role": "user", "content": "And now?\n"}], add_generation_prompt=True),
    dict(messages=[USER, ANSWER, USER, ANSWER]),
    dict(messages=[{"role": "user", "content": ""}], add_generation_prompt=True),
    dict(messages=[{"role": "user", "content": "\u65e5\u672c \U0001f600 <|im_end|> {{ x }} {% y %}"}], add_generation_prompt=True),
]
TOOL_CONVERSATIONS = CONVERSATIONS + [
    dict(messages=[USER], tools=TOOLS, add_generation_prompt=True),
    dict(messages=[SYSTEM, USER], tools=TOOLS, add_generation_prompt=True, extra={"enable_thinking": False}),
    dict(messages=[SYSTEM, USER, CALLS, *REPLIES], tools=TOOLS, add_generation_prompt=True),
    dict(messages=[USER, CALLS, *REPLIES, ANSWER, USER, CALLS, REPLIES[0]], add_generation_prompt=True),
    dict(messages=[PARTS], add_generation_prompt=True, extra={"enable_thinking": True}),
    dict(messages=[USER, ANSWER, USER], extra={"shout": True, "stop_after": 2}),
    dict(messages=[USER, {"role": "assistant", "content": None}], tools=[]),
    dict(messages=[USER, SYSTEM]),
    dict(messages=[{"role": "robot", "content": "x"}]),
    dict(messages=[{"role": "user", "content": 5}]),
    dict(messages=[{"role": "user", "content": [{"type": "sound"}]}]),
    dict(messages=[ANSWER]),
]
# Small templates, each for one habit of Jinja2 on Python.
SNIPPETS = {
    "printing": "{{ true }} {{ false }} {{ none }} {{ 1 }} {{ 1.0 }} {{ 1e20 }} {{ [1, 'a', \"it's\"] }} {{ {'a': [none]} }} {{ missing }}|",
    "strings": "{{ 1e20 | string }} {{ 1e-7 | string }} {{ [1e20, true, 'a'] | string }} {{ none | string }} {{ missing | string }}|{{ [1.0, none] ~ true ~ 1.5 }}",
    "tests": "{% for v in ['s', 1, 1.5, true, none, [], {}, missing] %}{{ v is string }}{{ v is number }}{{ v is integer }}{{ v is float }}"
    "{{ v is boolean }}{{ v is mapping }}{{ v is sequence }}{{ v is iterable }}{{ v is none }}{{ v is defined }}{{ v is true }};{% endfor %}",
    "methods": "{{ ' ab '.strip() }}{{ 'xxabxx'.strip('x') }}{{ 'a,b,c'.split(',') }}{{ 'a  b'.split() }}{{ 'a,b,c'.split(',', 1) }}"
    "{{ 'a,b,c'.rsplit(',', 1) }}{{ 'ab'.upper() }}{{ 'a-b'.replace('-', '+') }}{{ 'abc'.find('c') }}{{ 'abc'.removeprefix('a') }}"
    "{{ 'abc'.removesuffix('c') }}{{ 'abc'.partition('b')[2] }}{{ 'one two'.title() }}{{ 'a\\nb'.splitlines() }}{{ '-'.join(['a', 'b']) }}",
    "slices": "{{ [1, 2, 3][::-1] }}{{ [1, 2, 3][1:] }}{{ [1, 2, 3][:-1] }}{{ [1, 2, 3][-1] }}{{ 'abc'[::-1] }}{{ 'abc'[1:] }}{{ (1, 2)[0] }}",
    "arithmetic": "{{ 7 // 2 }} {{ 7 % 3 }} {{ 7 / 2 }} {{ 2 ** 3 }} {{ -1 }} {{ 'ab' * 3 }} {{ 1 + 1.5 }} {{ [1] + [2] }}",
    "filters": "{{ ['b', 'a'] | sort | join('-') }} {{ 'x' | default('y') }} {{ missing | default('y') }} {{ none | default('y', true) }} {{ [1, 2] | first }}"
    " {{ [1, 2] | last }} {{ [3, 1] | max }} {{ 'abc' | length }} {{ [{'r': 'u'}, {'r': 'a'}] | selectattr('r', 'equalto', 'u') | list | length }}"
    " {{ {'b': 1, 'a': 2} | dictsort }} {{ 'a b' | replace(' ', '_') }} {{ '3' | int + 1 }} {{ 'a' | capitalize }} {{ [1, 2, 2] | unique | list }}"
    " {{ 'l1\nl2' | indent(2) }} {{ [0, 1, ''] | select | list }} {{ ['a', 'b'] | map('upper') | list }}",
    "json": "{{ {'b': 'a\"\\\\\u00e9\u2028\\n\\t<>&\\'', 'a': [1, 2.0, 1e-7, true, none, [], {}]} | tojson }} {{ {'a': [1, {'b': []}]} | tojson(indent=4) }}"
    " {{ [1, 2] | tojson(separators=(',', ':')) }} {{ {'b': 1, 'a': '\u00e9\U0001f600'} | tojson(sort_keys=true, ensure_ascii=true) }}",
    "whitespace": "  {% if true %}\n  a\n  {%- if true %} b {% endif -%}\n  c\n  {% endif %}\n  {# note #}\nd {%+ if true %}e{% endif +%}\nf\n\n",
    "scope": "{% set x = 1 %}{% for i in [1, 2] %}{% set x = i + 10 %}{{ x }}{% endfor %}{{ x }}{% set ns = namespace(y=1) %}{% for i in [1, 2] %}{% set ns.y = i %}{% endfor %}{{ ns.y }}",
    "loop": "{% for i in ['a', 'b', 'c'] %}{{ loop.index }}{{ loop.index0 }}{{ loop.revindex }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.previtem }}{{ loop.nextitem }}"
    "{% if loop.index == 2 %}{% continue %}{% endif %}.{% else %}none{% endfor %}{% for i in [] %}x{% else %}none{% endfor %}{% for i in range(3) if i %}{{ i }}{% endfor %}",
    "captured": "{% set x %} a {{ 1 }} {% endset %}[{{ x }}]{% macro m(a, b=2) %}{{ a }}{{ b }}{% endmacro %}{{ m(1) }}{{ m(1, b=3) }}{% filter upper %}abc{% endfilter %}",
    "undefined attribute": "{{ missing.attribute }}",
    "undefined sum": "{{ 'a' + missing }}",
    "undefined loop": "[{% for x in missing %}{{ x }}{% endfor %}]{{ messages[9] is defined }}{{ messages[0].absent }}{{ messages[0]['absent'] is none }}",
    "concatenation": "{{ 'a' ~ 1 ~ none ~ true }}",
    "conditional": "{{ 'a' if messages else 'b' }}{{ 'a' if not messages }}{{ messages and 'yes' }}{{ missing or 'no' }}{{ 1 if 'role' in messages[0] }}",
}


def byte_map():
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(0x100 + i) for i, b in enumerate(others)}


class Plain:
    """A byte-pair encoder written for this script: the independent reference."""

    def __init__(self, vocab, merges, special):
        self.vocab, self.special, self.bytes = vocab, special, byte_map()
        self.ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
        self.splitter = regex.compile("(" + "|".join(map(regex.escape, sorted(special, key=len, reverse=True))) + ")")

    def encode(self, text, parse_special):
        ids = []
        for piece in self.splitter.split(text) if parse_special else [text]:
            if parse_special and piece in self.special:
                ids.append(self.vocab[piece])
                continue
            for run in regex.findall(r"\p{N}|\P{N}+", piece):
                for word in regex.findall(GPT2, run):
                    ids += self.word(word)
        return ids

    def word(self, word):
        # Bytes that the vocabulary lacks are dropped before merging, as in the library.
        parts = [self.bytes[b] for b in word.encode()]
        parts = [part for part in parts if part in self.vocab]
        while len(parts) > 1:
            rank, at = min((self.ranks.get(pair, 1 << 60), i) for i, pair in enumerate(zip(parts, parts[1:])))
            if rank == 1 << 60:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        return [self.vocab[part] for part in parts]


def pre_tokenizer(name):
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if name == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    split = pre_tokenizers.Split(Regex(PATTERNS[name]), behavior="isolated", invert=False)
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def write(name, value):
    path = OUT / name
    # One entry a line, so that a change shows as the entries that changed.
    def lines(value, depth):
        if depth == 0 or not isinstance(value, (dict, list)):
            return json.dumps(value)
        pairs = value.items() if isinstance(value, dict) else [(None, item) for item in value]
        inner = [(f"{json.dumps(key)}: " if key is not None else "") + lines(item, depth - 1) for key, item in pairs]
        opening, closing = "{}" if isinstance(value, dict) else "[]"
        return f"{opening}\n" + ",\n".join(inner) + f"\n{closing}"

    path.write_text(lines(value, 3 if "words" in value else 2) + "\n")
    print("wrote", path.relative_to(ROOT))


def render(tokenizer, template, case):
    case = dict(case)
    extra = case.pop("extra", {})
    try:
        text = tokenizer.apply_chat_template(chat_template=template, conversation=case.pop("messages"), tokenize=False, **case, **extra)
        return {"text": text}
    except Exception as error:  # noqa: BLE001
        return {"error": str(error), "kind": type(error).__name__}


def main():
    model = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf")
    fields = GGUFReader(model).fields
    value = lambda key: fields["tokenizer." + key].contents()  # noqa: E731
    assert value("ggml.pre") == "smollm"
    tokens, merges, types = value("ggml.tokens"), value("ggml.merges"), value("ggml.token_type")
    vocab = {token: id for id, token in enumerate(tokens)}
    special = [token for token, kind in zip(tokens, types) if kind == 3]

    library = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(m.split(" ")) for m in merges]))
    library.pre_tokenizer, library.decoder = pre_tokenizer("smollm"), decoders.ByteLevel()
    library.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    plain = Plain(vocab, merges, set(special))

    cases = []
    for text in TEXTS:
        ids = {}
        for parse in (True, False):
            library.encode_special_tokens = not parse
            ids[parse] = library.encode(text, add_special_tokens=False).ids
            if ids[parse] != plain.encode(text, parse):
                raise SystemExit(f"the references disagree on {text!r}:\n{ids[parse]}\n{plain.encode(text, parse)}")
        cases.append({"text": text, "ids": ids[True], "ids_without_special": ids[False], "decoded": library.decode(ids[True], skip_special_tokens=False)})
    library.encode_special_tokens = True
    long = []
    for piece, tail in [(" ", "x"), ("\n", "x"), (" \n", "x"), ("a", " b"), ("ab ", ""), ("=", "x"), ("9", "x"), ("\u65e5", "x"), ("e\u0301", " ")]:
        ids = library.encode(piece * 300_000 + tail, add_special_tokens=False).ids
        checksum = sum((at + 1) * id for at, id in enumerate(ids)) % (1 << 32)
        long.append({"piece": piece, "repeat": 300_000, "tail": tail, "count": len(ids), "checksum": checksum})
    missing = sorted(b for b, stand_in in byte_map().items() if stand_in not in vocab)

    fast = PreTrainedTokenizerFast(tokenizer_object=library, bos_token="<|im_start|>", eos_token="<|im_end|>", unk_token="<|endoftext|>", pad_token="<|im_end|>")
    template = value("chat_template")
    source = f"transformers {transformers.__version__}"
    write(
        "smollm2.json",
        {
            "source": "scripts/golden_tokenizer.py",
            "bytes_without_token": missing,
            "cases": cases,
            "long": long,
            "chat": [{**case, "expected": render(fast, template, case)} for case in CONVERSATIONS],
        },
    )
    pre = {}
    for name in ["smollm", "gpt-2", *PATTERNS]:
        splitter, nfc = pre_tokenizer(name), normalizers.NFC()
        texts = [nfc.normalize_str(text) if name.startswith("qwen") else text for text in TEXTS]
        pre[name] = [[word for word, _ in splitter.pre_tokenize_str(text)] for text in texts]
    write("pre.json", {"source": "scripts/golden_tokenizer.py", "texts": TEXTS, "words": pre})
    tools = (OUT / "tools.jinja").read_text()
    snippets = [{"name": name, "template": text, "expected": render(fast, text, CONVERSATIONS[0])} for name, text in SNIPPETS.items()]
    write(
        "chat.json",
        {
            "source": f"scripts/golden_tokenizer.py, {source}",
            "tools_template": [{**case, "expected": render(fast, tools, case)} for case in TOOL_CONVERSATIONS],
            "snippets": snippets,
        },
    )


if __name__ == "__main__":
    main()
