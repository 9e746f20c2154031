"""What transformers computes from assets/ampoule-nano: writes conformance/golden/nano.

    pip install torch==2.11.0 transformers==5.17.0 safetensors
    python scripts/golden_nano.py                          # about two minutes on one core
    python scripts/golden_nano.py --check                  # makes them elsewhere and compares
    python scripts/golden_nano.py --heldout heldout.jsonl  # also draws the tokenizer's texts anew

`prompts.json`: twenty prompts, each a text or a conversation (with tools), the text that transformers' chat template
makes of it, its ids, and the 64 tokens that follow greedily. `expected.safetensors`, for prompt NN of n tokens:

    NN.positions   I32 [3]         rows that are stored (one where n is 1)
    NN.logits      F32 [3, 4096]   the weights widened to float32, arithmetic in float32
    NN.logits_bf16 BF16 [3, 4096]  weights and arithmetic in bfloat16, as transformers loads the folder by default
    NN.log_prob    F32 [n - 1]     float32: log probability of token i + 1 after token i

`tokenizer.json`: held-out documents of every kind and texts that are hard to cut, with their ids, and what the ids
decode to where that is another text.
"""

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path

import safetensors
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "assets/ampoule-nano"
GOLDEN = ROOT / "conformance/golden/nano"
GREEDY = 64
SMALLEST_GAP = 5e-4  # between the two best logits of a greedy step: several times the float32 error of a logit

user = lambda text: {"role": "user", "content": text}
assistant = lambda text: {"role": "assistant", "content": text}
system = lambda text: {"role": "system", "content": text}
result = lambda value: {"role": "tool", "content": json.dumps(value)}


def call(name, **arguments):
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}]}


def tool(name, description, **properties):
    properties = {key: {"type": kind, "description": text} for key, (kind, text) in properties.items()}
    return {"type": "function", "function": {"name": name, "description": description,
            "parameters": {"type": "object", "properties": properties, "required": list(properties)}}}


WEATHER = tool("get_weather", "Get the current weather in a city.", city=("string", "Name of the city"))
TIMER = tool("set_timer", "Start a timer.", minutes=("integer", "How many minutes"), label=("string", "What the timer is for"))
MESSAGE = tool("send_message", "Send a message to a person.", to=("string", "Who gets it"), text=("string", "The message"))
MOVE = tool("move_to", "Drive the robot to a room.", room=("string", "The room"))
GRASP = tool("grasp", "Grasp an object.", object=("string", "The object"))
ODD = {"type": "function", "function": {"name": "mystère", "description": "Quotes \" and <tags> & 'more'; größer als 1.", "parameters": {
    "type": "object", "properties": {"wert": {"type": ["number", "null"], "minimum": 0.5, "enum": [1, 2.5, None, True]}}, "required": []}}}

HOUSE = ("The red cup is on the table in the kitchen. The blue ball is on the floor in the garage. The green book is on the shelf in "
         "the bedroom. The yellow box is on the desk in the office. You are in the kitchen. Tell me when you are ready.")
STORY = ("Old Marta kept the lighthouse on the north shore. Every evening she climbed one hundred and forty steps, cleaned the glass and "
         "lit the lamp. One night in March a thick fog came in from the sea, and the lamp went out. Marta rang the bell by hand until "
         "the sun rose. In the morning three small boats lay safe in the harbor, and the fishermen brought her bread, soup and a new "
         "rope for the bell. ")
FISH = ("The fishermen told the story in every village along the coast, and each of them told it a little differently. In one the "
        "bell was made of silver, in another there were thirty boats and not three, and in the third the fog itself had grown tired "
        "and gone to sleep. Marta heard all of them and laughed. When her hands grew too old for the rope, a boy named Noah came up "
        "the steps with her lunch and did not go down again. He learned how to clean the glass, how to trim the wick, and how to read "
        "the clouds above the hills. He wrote the ships into the big book, with the day and the hour, and he never forgot the lamp. ")

PROMPTS = [
    ("one word", "The"),
    ("story begins", "Once upon a time, in a small village by the sea, there lived a"),
    ("facts", "Bees are small insects. They live in a hive, and they make honey from the flowers that they visit."),
    ("code", "def area(width, height):\n    \"\"\"Area of a rectangle.\"\"\"\n    return width * height\n\n\nfor i in range(3):\n    print(i,"),
    ("other scripts", "東京駅の時計は静かに零時を指した。Поезд тронулся без гудка. ¿Quién había dejado la carta? 🚆🌧️ Grüße, naïve café —"),
    ("numbers", "1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233; 3.14159 x 2 = 6.28318; 2024-11-05T08:31:07Z\n1,"),
    ("repetition", "left right " * 60 + "left"),
    ("special tokens", "<|im_start|>user\nTell me about the moon.<|im_end|>\n<|im_start|>assistant\nThe moon"),
    ("long text", STORY + FISH + STORY.replace("Marta", "Noah").replace("she", "he").replace("her", "him") + FISH.replace("Noah", "Lena").replace("Marta", "Noah") + "In the end"),
    ("question", [user("Why is the sky blue?")]),
    ("story", [user("Tell me a short story about a shy fox who finds a golden key.")]),
    ("list, with a system message", [system("You are a helpful assistant. You answer in lists."), user("List five healthy snacks.")]),
    ("facts to remember", [user("My name is Clara. I live in Oslo. I have a cat called Max."), assistant("I will remember that."),
                           user("Where do I live?"), assistant("You live in Oslo."), user("What is my cat called?")]),
    ("robot", [system("You are a robot in a house. You can move, look, pick up and put down objects."), user(HOUSE), assistant("I am in the kitchen. I am ready."),
               user("Please bring the red cup to the office and put it on the desk.")]),
    ("robot, long", [system("You are a household robot. Say what you do, step by step."), user(HOUSE), assistant("I am in the kitchen. I am ready."),
                     user("Tell me a story while we wait."), assistant((STORY + FISH).strip()), user("Go to the garage."), assistant("OK. I went to the garage."), user("What do you see?"),
                     assistant("I see the blue ball on the floor."), user("Put the blue ball on the table in the bedroom."),
                     assistant("OK. My steps:\n1. pick up the blue ball from the floor\n2. go to the bedroom\n3. put the blue ball on the table\nDone. The blue ball is on the table in the bedroom."),
                     user("Where is the blue ball?")]),
    ("one tool", [user("What is the weather in Paris?")], [WEATHER]),
    ("three tools, called once", [system("You can use tools to help the user."), user("Can you set a timer for 12 minutes for pasta?"), call("set_timer", minutes=12, label="pasta"),
                                  result({"status": "started", "minutes": 12})], [WEATHER, TIMER, MESSAGE]),
    ("two calls in a row", [user("Get the green book from the bedroom."), call("move_to", room="bedroom"), result({"status": "arrived", "room": "bedroom"})], [MOVE, GRASP]),
    ("calls of two turns", [user("How warm is it in Lagos?"), call("get_weather", city="Lagos"), result({"city": "Lagos", "temperature": 31, "sky": "cloudy"}),
                            assistant("It is cloudy in Lagos, with 31 degrees."), user("Thank you! Tell Omar: see you on Friday."),
                            call("send_message", to="Omar", text="See you on Friday"), result({"status": "sent"})], [MESSAGE, WEATHER, TIMER]),
    ("odd tool", [system("Größe zählt: \"ja\" & <nein>."), user("Use it with 2.5, or ask me \\ why.")], [ODD, TIMER]),
]

HARD = ["", " ", "\n\n\n", "a", "  two  spaces\n\ttabs\r\n", "Don't we'll I'M they'RE", "x" * 300, "1234567890 12.5e-3 0x1F", "Kölle, 東京, 🚆🌧️, ١٢٣", "e\u0301 \u00e9 \ufb01 \u212b",
        "<|im_start|><|im_end|><|endoftext|>", "<tool_call>{}</tool_call><tools></tools> <tool_response>", "<|im_start|", "user\n<|im_end|>  \n", "a\u00a0b\u2003c\u200bd",
        "\u0000\u0001\u001f\u007f", "ελληνικά हिन्दी 한국어 עברית العربية", "```rust\nfn main() { println!(\"{}\", 1 << 3); }\n```", "https://example.org/?q=a%20b&c=[1]#frag"]


def render(tokenizer, entry):
    if isinstance(entry[1], str):
        return entry[1]
    return tokenizer.apply_chat_template(entry[1], tools=entry[2] if len(entry) > 2 else None, add_generation_prompt=True, tokenize=False)


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


@torch.no_grad()
def greedy(model, ids):
    out = model(input_ids=torch.tensor([ids]), use_cache=True, logits_to_keep=1)
    said, gap = [], float("inf")
    while len(said) < GREEDY:
        best = out.logits[0, -1].topk(2)
        said.append(int(best.indices[0]))
        gap = min(gap, float(best.values[0] - best.values[1]))
        out = model(input_ids=torch.tensor([[said[-1]]]), past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
    return said, gap


@torch.no_grad()
def make(folder):
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    wide = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, attn_implementation="eager").eval()
    half = AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto", attn_implementation="eager").eval()
    assert half.dtype == torch.bfloat16
    tensors, prompts, errors = {}, [], []
    for number, entry in enumerate(PROMPTS):
        text = render(tokenizer, entry)
        ids = ids_of(tokenizer, text)
        n = len(ids)
        logits = wide(torch.tensor([ids])).logits[0]
        in_half = half(torch.tensor([ids])).logits[0]
        errors.append(float((in_half.float() - logits).norm() / logits.norm()))
        rows = torch.tensor(sorted({n // 3, 2 * n // 3, n - 1}), dtype=torch.int32)
        following = torch.tensor(ids[1:])
        log_prob = logits[:-1].log_softmax(-1).gather(-1, following[:, None])[:, 0]
        said, gap = greedy(wide, ids)
        tensors |= {f"{number:02}.positions": rows, f"{number:02}.logits": logits[rows].contiguous(), f"{number:02}.logits_bf16": in_half[rows].contiguous(),
                    f"{number:02}.log_prob": log_prob.contiguous()}
        asked = {"prompt": entry[1]} if isinstance(entry[1], str) else {"messages": entry[1], "tools": entry[2] if len(entry) > 2 else None}
        prompts.append({"kind": entry[0], **asked, "text": text, "ids": ids, "greedy": said, "smallest_gap": float(f"{gap:.3g}")})
        print(f"{number:02} {n:4} tokens  bf16 against f32 {errors[-1]:.1e}  smallest gap {gap:.1e}  {entry[0]}: {tokenizer.decode(said)[:60]!r}")
        assert gap > SMALLEST_GAP, "a near tie: change the prompt"
    made = {"torch": torch.__version__, "transformers": transformers.__version__, "safetensors": safetensors.__version__,
            "bf16_against_f32_frobenius": [float(f"{e:.3g}") for e in errors]}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "expected.safetensors", {"made_by": json.dumps(made)})
    (folder / "prompts.json").write_text(dump({"made_by": made, "prompts": prompts}, "prompts"))
    return tokenizer


def dump(value, key):
    """JSON with one entry of the list a line."""
    lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in value[key])
    head = {k: v for k, v in value.items() if k != key}
    return json.dumps(head, ensure_ascii=False)[:-1] + (", " if head else "") + f'"{key}": [\n{lines}\n]}}\n'


def draw(tokenizer, heldout):
    """Sixty documents, all kinds, and what is hard."""
    kinds = {}
    for line in open(heldout):
        document = json.loads(line)
        kinds.setdefault(document["kind"], []).append(document["text"])
    r = random.Random(1)
    texts = [(kind, text) for kind, all_texts in sorted(kinds.items()) for text in r.sample(all_texts, min(7, len(all_texts)))]
    texts += [("hard", text) for text in HARD]
    entries = [{"kind": kind, "text": text, "ids": ids_of(tokenizer, text)} for kind, text in texts]
    for entry in entries:  # the tokenizer composes characters (NFC), so some texts come back otherwise
        back = tokenizer.decode(entry["ids"], clean_up_tokenization_spaces=False)
        entry |= {"decoded": back} if back != entry["text"] else {}
    (GOLDEN / "tokenizer.json").write_text(dump({"texts": entries}, "texts"))
    print(len(entries), "texts,", sum(len(e["ids"]) for e in entries), "tokens")


def check(folder):
    wrong = []
    kept, made = (json.loads((f / "prompts.json").read_text())["prompts"] for f in (GOLDEN, folder))
    for a, b in zip(kept, made, strict=True):
        wrong += [f"{a['kind']}: {key}" for key in ("text", "ids", "greedy") if a[key] != b[key]]
    a, b = (load_file(f / "expected.safetensors") for f in (GOLDEN, folder))
    assert a.keys() == b.keys()
    for name in a:
        most = 1e-2 if name.endswith("bf16") else 1e-4
        error = float((a[name].float() - b[name].float()).norm() / a[name].float().norm().clamp_min(1e-9))
        if error > most:
            wrong.append(f"{name}: {error:.1e}")
    print("differs: " + ", ".join(wrong) if wrong else "the same")
    return 1 if wrong else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--heldout", type=Path)
    args = parser.parse_args()
    if args.check:
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder))
            sys.exit(check(Path(folder)))
    tokenizer = make(GOLDEN)
    if args.heldout:
        draw(tokenizer, args.heldout)


if __name__ == "__main__":
    main()
