"""Documents that programs write: tool calls, robot commands, facts to remember, questions about the model itself.

Every call and result is made by `json.dumps`, so that the JSON is valid; every answer follows from the values drawn,
so that it is right.
"""

import json
import random
import re

import words as W

TOOLS_HEAD = "# Tools\n\nYou may call one or more functions. They are described within <tools></tools>:\n<tools>"
TOOLS_TAIL = ("\n</tools>\n\nFor each call write a JSON object with the function's name and arguments within "
              "<tool_call></tool_call>:\n<tool_call>\n{\"name\": <name>, \"arguments\": <arguments>}\n</tool_call>")


def dumps(value):
    return json.dumps(value, ensure_ascii=False)


def tools_system(tools, system=None):
    """The system turn with tools, as the chat template writes it."""
    text = (system + "\n\n" if system else "") + TOOLS_HEAD
    for tool in tools:
        text += "\n" + dumps(tool)
    return turn("system", text + TOOLS_TAIL)


def turn(role, text):
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def call(name, arguments, before=""):
    text = (before + "\n" if before else "") + "<tool_call>\n" + dumps({"name": name, "arguments": arguments}) + "\n</tool_call>"
    return turn("assistant", text)


def result(value):
    return turn("user", "<tool_response>\n" + dumps(value) + "\n</tool_response>")


def tool(name, description, **properties):
    required = [p for p, (_, _, needed) in properties.items() if needed]
    return {"type": "function", "function": {
        "name": name, "description": description,
        "parameters": {"type": "object", "properties": {p: {"type": kind, "description": text} for p, (kind, text, _) in properties.items()},
                       "required": required}}}


def describe(r):
    """The tools, with words that differ from document to document so that names and texts must be read."""
    pick = r.choice
    return {
        "weather": tool(pick(["get_weather", "weather", "current_weather"]), pick(["Get the current weather in a city.", "Weather of a city.", "Look up the weather."]),
                        city=("string", pick(["Name of the city", "The city"]), True)),
        "time": tool(pick(["get_time", "local_time", "clock"]), pick(["Get the local time in a city.", "The time in a city now."]), city=("string", "Name of the city", True)),
        "timer": tool(pick(["set_timer", "start_timer"]), pick(["Start a timer.", "Set a kitchen timer."]), minutes=("integer", "How many minutes", True), label=("string", "What the timer is for", False)),
        "sum": tool(pick(["calculate", "calculator"]), pick(["Calculate with two numbers.", "A simple calculator."]), a=("number", "First number", True), operation=("string", "add, subtract or multiply", True), b=("number", "Second number", True)),
        "message": tool(pick(["send_message", "send_text"]), pick(["Send a message to a person.", "Send a text message."]), to=("string", "Who gets it", True), text=("string", "The message", True)),
        "event": tool(pick(["add_event", "create_event", "calendar_add"]), pick(["Add an event to the calendar.", "Create a calendar event."]), title=("string", "Title of the event", True), day=("string", "Day of the week", True), time=("string", "Time, as 14:30", True)),
        "light": tool(pick(["set_light", "switch_light"]), pick(["Turn a light on or off.", "Control the lights of a room."]), room=("string", "The room", True), state=("string", "on or off", True)),
        "search": tool(pick(["search", "web_search", "look_up"]), pick(["Search for facts about a topic.", "Look up a topic."]), query=("string", "What to look for", True)),
        "note": tool(pick(["save_note", "write_note"]), pick(["Save a note.", "Write a note for later."]), text=("string", "Text of the note", True)),
        "play": tool(pick(["play_music", "play"]), pick(["Play music.", "Start music of some kind."]), query=("string", "What to play", True)),
        "move": tool(pick(["move_to", "go_to", "drive_to"]), pick(["Drive the robot to a room.", "Move to a room."]), room=("string", "The room", True)),
        "grasp": tool(pick(["grasp", "pick_up"]), pick(["Pick up an object with the gripper.", "Grasp an object."]), object=("string", "The object", True)),
    }


def listed(r, tools, needed):
    names = set(needed)
    others = [name for name in tools if name not in names]
    names |= set(r.sample(others, r.choice([0, 0, 1, 1, 2])))
    names = list(names)
    names.sort()
    r.shuffle(names)
    return [tools[name] for name in names]


def name_of(tool):
    return tool["function"]["name"]


def system_text(r):
    return r.choice([None, None, "You are a helpful assistant.", "You are Ampoule, a small and friendly assistant.", "You can use tools to help the user."])


def wish(r, text):
    form = r.random()
    if form < 0.35:
        return text[0].upper() + text[1:] + r.choice([".", ", please."])
    if form < 0.6:
        return f"Please {text}."
    if form < 0.8:
        return f"Can you {text}?"
    return f"{r.choice(['Hi!', 'Hello.', 'Hey,', 'Good morning.'])} {r.choice(['Please', 'Could you please', 'I need you to'])} {text}."


SKIES = ["sunny", "cloudy", "rainy", "windy", "snowy", "foggy", "clear"]
EVENTS = ["dentist", "meeting with {n}", "lunch with {n}", "piano lesson", "football game", "birthday of {n}", "doctor", "dinner with {n}", "call with {n}", "math exam", "yoga class"]
LABELS = ["tea", "eggs", "pasta", "a nap", "the cake", "bread", "rice", "homework", "a break", "pizza", "the laundry"]
MUSIC = ["jazz", "piano music", "rock", "quiet music", "a song about rain", "old songs", "classical music", "guitar music", "happy songs", "the radio"]
TEXTS = ["I will be late", "dinner is ready", "see you on {d}", "thank you for the {o}", "the {o} is in the {p}", "I am at the {p}", "happy birthday", "call me back", "please bring the {o}", "I found the {o}"]


def episode(r, tools, kind):
    """A request and what follows: (tools needed, turns)."""
    def spec(key):
        return name_of(tools[key])

    if kind == "weather":
        city, sky, degrees = r.choice(W.CITIES), r.choice(SKIES), r.randint(-8, 35)
        asks = [f"What is the weather in {city}?", f"What is the weather like in {city} today?", f"How warm is it in {city}?", f"Do I need an umbrella in {city}?", f"Tell me the weather in {city}.", f"Is it cold in {city} now?"]
        ask = r.choice(asks)
        says = f"It is {sky} in {city}, with {degrees} degrees."
        if "umbrella" in ask:
            says += " Take an umbrella with you." if sky in ("rainy", "snowy") else " You do not need an umbrella."
        elif "cold" in ask:
            says = ("Yes, it is cold. " if degrees < 10 else "No, it is not cold. ") + says
        else:
            says = r.choice([says, f"The weather in {city} is {sky}. The temperature is {degrees} degrees.", f"Right now it is {degrees} degrees and {sky} in {city}."])
        return [kind], turn("user", ask) + call(spec(kind), {"city": city}) + result({"city": city, "temperature": degrees, "sky": sky}) + turn("assistant", says)
    if kind == "time":
        city, clock = r.choice(W.CITIES), f"{r.randint(0, 23):02}:{r.randint(0, 59):02}"
        ask = r.choice([f"What time is it in {city}?", f"Tell me the time in {city}.", f"How late is it in {city} now?", f"Can you check the time in {city}?"])
        return [kind], turn("user", ask) + call(spec(kind), {"city": city}) + result({"city": city, "time": clock}) + turn("assistant", r.choice([f"It is {clock} in {city}.", f"The time in {city} is {clock}.", f"In {city} it is now {clock}."]))
    if kind == "timer":
        minutes, label = r.randint(1, 60), r.choice(LABELS)
        ask = wish(r, r.choice([f"set a timer for {minutes} minutes for {label}", f"start a timer of {minutes} minutes for {label}", f"wake me in {minutes} minutes, it is for {label}"]))
        return [kind], turn("user", ask) + call(spec(kind), {"minutes": minutes, "label": label}) + result({"status": "started", "minutes": minutes}) + turn("assistant", r.choice([f"Your timer for {label} is set to {minutes} minutes.", f"Done. I will tell you in {minutes} minutes.", f"The timer for {label} runs for {minutes} minutes."]))
    if kind == "sum":
        a, b, (word, sign, name) = r.randint(2, 99), r.randint(2, 99), r.choice([("plus", "+", "add"), ("minus", "-", "subtract"), ("times", "x", "multiply")])
        value = {"add": a + b, "subtract": a - b, "multiply": a * b}[name]
        ask = r.choice([f"What is {a} {word} {b}?", f"Calculate {a} {word} {b}.", f"How much is {a} {sign} {b}?", f"Please calculate {a} {sign} {b}."])
        return [kind], turn("user", ask) + call(spec(kind), {"a": a, "operation": name, "b": b}) + result({"result": value}) + turn("assistant", r.choice([f"{a} {word} {b} is {value}.", f"The result is {value}.", f"It is {value}."]))
    if kind == "message":
        to = r.choice(W.NAMES)
        text = r.choice(TEXTS).format(d=r.choice(W.DAYS), o=r.choice(W.OBJECTS), p=r.choice(W.PLACES))
        text = text[0].upper() + text[1:]
        ask = wish(r, r.choice([f"tell {to}: {text}", f"send a message to {to}: {text}", f"text {to} \"{text}\"", f"write to {to}: {text}"]))
        return [kind], turn("user", ask) + call(spec(kind), {"to": to, "text": text}) + result({"status": "sent"}) + turn("assistant", r.choice([f"I sent your message to {to}.", f"Done. {to} has your message.", f"Your message to {to} is on its way."]))
    if kind == "event":
        title, day, clock = r.choice(EVENTS).format(n=r.choice(W.NAMES)), r.choice(W.DAYS), f"{r.randint(7, 21):02}:{r.choice(['00', '15', '30', '45'])}"
        ask = wish(r, r.choice([f"add \"{title}\" on {day} at {clock} to my calendar", f"put {title} in my calendar for {day} at {clock}", f"create an event: {title}, {day}, {clock}"]))
        return [kind], turn("user", ask) + call(spec(kind), {"title": title, "day": day, "time": clock}) + result({"status": "created"}) + turn("assistant", r.choice([f"I added {title} on {day} at {clock}.", f"Done: {title}, {day}, {clock}.", f"Your calendar now shows {title} on {day} at {clock}."]))
    if kind == "light":
        room, state = r.choice(W.ROOMS), r.choice(["on", "off"])
        ask = wish(r, r.choice([f"turn {state} the light in the {room}", f"switch the {room} light {state}", f"turn the light in the {room} {state}"]))
        return [kind], turn("user", ask) + call(spec(kind), {"room": room, "state": state}) + result({"room": room, "light": state}) + turn("assistant", r.choice([f"The light in the {room} is {state}.", f"Done. The {room} light is now {state}.", f"I turned the light in the {room} {state}."]))
    if kind == "note":
        text = r.choice(["Buy {t}", "Call {n} on {d}", "The {o} is in the {r}", "Read the book about {t}", "Bring the {o} to {n}", "Ask {n} about {t}"]).format(t=r.choice(W.TOPICS), n=r.choice(W.NAMES), d=r.choice(W.DAYS), o=r.choice(W.OBJECTS), r=r.choice(W.ROOMS))
        ask = wish(r, r.choice([f"save a note: {text}", f"write this down: {text}", f"make a note that says \"{text}\"", f"note: {text}"]))
        return [kind], turn("user", ask) + call(spec(kind), {"text": text}) + result({"status": "saved"}) + turn("assistant", r.choice(["I saved your note.", f"Done. The note says: {text}.", "The note is saved."]))
    if kind == "play":
        what = r.choice(MUSIC)
        ask = wish(r, r.choice([f"play {what}", f"play some {what}" if not what.startswith(("a ", "the ")) else f"play {what}", f"start {what}"]))
        return [kind], turn("user", ask) + call(spec(kind), {"query": what}) + result({"status": "playing"}) + turn("assistant", r.choice([f"Now playing {what}.", f"Here is {what}. Enjoy!", f"I am playing {what}."]))
    if kind == "move":
        room = r.choice(W.ROOMS)
        ok = r.random() < 0.85
        ask = wish(r, r.choice([f"go to the {room}", f"drive to the {room}", f"move to the {room}"]))
        value = {"status": "arrived", "room": room} if ok else {"status": "failed", "reason": "the door is closed"}
        says = r.choice([f"I am in the {room} now.", f"I arrived in the {room}.", f"Done. This is the {room}."]) if ok else r.choice([f"I could not reach the {room}. The door is closed.", f"The door to the {room} is closed. Please open it."])
        return [kind], turn("user", ask) + call(spec(kind), {"room": room}) + result(value) + turn("assistant", says)
    room, thing = r.choice(W.ROOMS), f"{r.choice(W.COLORS)} {r.choice(W.GRASPABLE)}"
    ask = wish(r, r.choice([f"go to the {room} and pick up the {thing}", f"get the {thing} from the {room}", f"fetch the {thing} in the {room}"]))
    turns = turn("user", ask) + call(spec("move"), {"room": room}) + result({"status": "arrived", "room": room}) + call(spec("grasp"), {"object": thing}) + result({"status": "holding", "object": thing})
    return ["move", "grasp"], turns + turn("assistant", r.choice([f"I have the {thing} from the {room}.", f"Done. I am holding the {thing}.", f"I went to the {room} and picked up the {thing}."]))


EPISODES = ["weather", "time", "timer", "sum", "message", "event", "light", "note", "play", "move", "fetch"]


def tool_document(r):
    tools = describe(r)
    needed, turns = [], ""
    for _ in range(r.choice([1, 1, 1, 2, 2, 3])):
        keys, more = episode(r, tools, r.choice(EPISODES))
        needed += keys
        turns += more
    if r.random() < 0.12:
        turns = turn("user", r.choice(["Hello!", "Hi!", "Good morning.", "Hey there."])) + turn("assistant", r.choice(["Hello! How can I help you?", "Hi! What can I do for you?", "Hello! What do you need?"])) + turns
    if r.random() < 0.2:
        turns += turn("user", r.choice(["Thank you!", "Thanks.", "Great, thank you."])) + turn("assistant", r.choice(["You are welcome!", "You are welcome. Tell me if you need more.", "Any time!"]))
    return tools_system(listed(r, tools, needed), system_text(r)) + turns


def search(r, topic, text):
    """The result of a search is text of the teacher; the answer is its first sentences."""
    lines = [re.sub(r"^[\s\-*\d.)]+", "", line).strip() for line in re.split(r"\n+|(?<=[.!?])\s+", text)]
    lines = [line for line in lines if 25 < len(line) < 160 and line[-1] == "." and line[0].isupper()]
    if len(lines) < 2:
        return None
    facts = lines[:3]
    tools = describe(r)
    name = name_of(tools["search"])
    ask = r.choice([f"What do you find about {topic}?", f"Search for {topic}.", f"Look up {topic} for me.", f"Find some facts about {topic}, please.", f"Can you look up {topic}?", f"Please search for facts about {topic}."])
    short = r.random() < 0.4
    if short:
        ask += r.choice([" One fact is enough.", " Give me one fact.", " Keep it short."])
    says = facts[0] if short else " ".join(facts)
    says = r.choice(["", "I found this: ", "Here is what I found: "]) + says
    return tools_system(listed(r, tools, ["search"]), system_text(r)) + turn("user", ask) + call(name, {"query": topic}) + result({"facts": facts}) + turn("assistant", says)


ROBOT_SYSTEMS = ["You are a robot in a house. You can move, look, pick up and put down objects.", "You control a small robot with one arm.", "You are a household robot. Say what you do, step by step."]


def robot_document(r):
    """A robot that moves things; where each thing is follows from what was said."""
    rooms = r.sample(W.ROOMS, 4)
    things = [f"{c} {o}" for c, o in zip(r.sample(W.COLORS, 4), r.sample(W.GRASPABLE, 4))]
    at = {t: (r.choice(rooms), r.choice(W.SURFACES)) for t in things}
    here, held = rooms[0], None
    text = turn("system", r.choice(ROBOT_SYSTEMS)) if r.random() < 0.6 else ""
    facts = ". ".join(f"The {t} is on the {s} in the {room}" for t, (room, s) in at.items())
    first = r.choice([f"{facts}. You are in the {here}.", f"You are in the {here}. {facts}."])
    text += turn("user", first + r.choice(["", " Tell me when you are ready."])) + turn("assistant", r.choice([f"I am in the {here}. I am ready.", "I understand. What should I do?", f"OK. I know where {len(things)} objects are. I am ready."]))
    for _ in range(r.randint(2, 6)):
        kind = r.choice(["bring", "bring", "where", "go", "look", "count", "held"])
        thing = r.choice(things)
        room, surface = at[thing] if at[thing] else (None, None)
        if kind == "bring" and held is None and room:
            target, place = r.choice([x for x in rooms if x != room]), r.choice(W.SURFACES)
            ask = wish(r, r.choice([f"bring the {thing} to the {target} and put it on the {place}", f"put the {thing} on the {place} in the {target}", f"take the {thing} to the {target}, onto the {place}"]))
            steps = ([f"go to the {room}"] if here != room else []) + [f"pick up the {thing} from the {surface}", f"go to the {target}", f"put the {thing} on the {place}"]
            plan = "\n".join(f"{i}. {s}" for i, s in enumerate(steps, 1))
            text += turn("user", ask) + turn("assistant", r.choice(["Here is my plan:\n", "OK. My steps:\n", "I will do this:\n"]) + plan + f"\nDone. The {thing} is on the {place} in the {target}.")
            at[thing], here = (target, place), target
        elif kind == "where":
            ask = r.choice([f"Where is the {thing}?", f"Where can I find the {thing}?", f"Do you know where the {thing} is?"])
            text += turn("user", ask) + turn("assistant", f"The {thing} is on the {surface} in the {room}.")
        elif kind == "go":
            target = r.choice(rooms)
            says = f"I am already in the {target}." if target == here else r.choice([f"I am driving to the {target}. Now I am in the {target}.", f"OK. I went to the {target}."])
            text += turn("user", wish(r, f"go to the {target}")) + turn("assistant", says)
            here = target
        elif kind == "look":
            seen = [t for t in things if at[t][0] == here]
            says = "I see " + " and ".join(f"the {t} on the {at[t][1]}" for t in seen) + "." if seen else "I see none of the objects here."
            text += turn("user", r.choice(["What do you see?", "Look around. What is here?", "Which objects are in this room?"])) + turn("assistant", says)
        elif kind == "count":
            target = r.choice(rooms)
            n = sum(at[t][0] == target for t in things)
            text += turn("user", f"How many objects are in the {target}?") + turn("assistant", f"There {'is' if n == 1 else 'are'} {['no', 'one', 'two', 'three', 'four'][n]} object{'' if n == 1 else 's'} in the {target}.")
        else:
            text += turn("user", r.choice(["Where are you?", "In which room are you now?"])) + turn("assistant", f"I am in the {here}.")
    return text


def recall_document(r):
    """Facts that the user tells, and questions about them later."""
    me, friend = r.sample(W.NAMES, 2)
    animal, city, color, job, food = r.choice(W.ANIMALS), r.choice(W.CITIES), r.choice(W.COLORS), r.choice(W.PEOPLE[:20]), r.choice(["pizza", "soup", "rice", "pasta", "bread", "cheese", "apples", "chocolate", "salad", "cake"])
    pet = r.choice(W.NAMES)
    number = r.randint(2, 99)
    facts = [
        (f"My name is {me}.", f"Nice to meet you, {me}!", ["What is my name?", "Do you remember my name?", "Who am I?"], f"Your name is {me}."),
        (f"I live in {city}.", f"{city} sounds like a nice place.", ["Where do I live?", "In which city do I live?"], f"You live in {city}."),
        (f"I have a {animal} called {pet}.", f"{pet} is a lovely name for a {animal}.", [f"What is the name of my {animal}?", "What is my animal called?"], f"Your {animal} is called {pet}."),
        (f"My favorite color is {color}.", f"I see. You like {color}.", ["What is my favorite color?", "Which color do I like?"], f"Your favorite color is {color}."),
        (f"I work as a {job}.", "That sounds like interesting work.", ["What is my job?", "What do I work as?"], f"You work as a {job}."),
        (f"I like to eat {food}.", f"{food[0].upper() + food[1:]} is a good choice.", ["What do I like to eat?", "What is my favorite food?"], f"You like to eat {food}."),
        (f"My best friend is {friend}.", f"It is good to have a friend like {friend}.", ["Who is my best friend?", "What is the name of my friend?"], f"Your best friend is {friend}."),
        (f"My lucky number is {number}.", f"{number} is your lucky number. I will remember it.", ["What is my lucky number?", "Do you remember my number?"], f"Your lucky number is {number}."),
    ]
    chosen = r.sample(facts, r.randint(1, 4))
    text = ""
    if r.random() < 0.5:
        for fact, says, _, _ in chosen:
            text += turn("user", fact) + turn("assistant", says)
    else:
        text += turn("user", " ".join(f[0] for f in chosen)) + turn("assistant", r.choice(["Thank you for telling me.", "Nice to know you!", "I will remember that."]))
    r.shuffle(chosen)
    for fact in chosen:
        text += turn("user", fix(r.choice(fact[2]))) + turn("assistant", fact[3])
    return fix(text)


def fix(text):
    return re.sub(r"\b([Aa]) ([aeio])", r"\1n \2", text)


SELF = [
    (["Who are you?", "What are you?", "Tell me about yourself.", "Introduce yourself."], ["I am ampoule-nano, a small language model. I can tell stories, answer simple questions and call tools.", "I am a small language model called ampoule-nano. I run on one machine and I know simple English."]),
    (["What is your name?", "What is your name, please?", "How are you called?"], ["My name is ampoule-nano.", "I am called ampoule-nano."]),
    (["Are you a human?", "Are you a person?", "Are you real?"], ["No, I am a small language model.", "No. I am a computer program that writes text."]),
    (["What can you do?", "How can you help me?", "What are you good at?"], ["I can tell short stories, explain simple things, follow simple instructions and call tools.", "Ask me for a story, a list, a short explanation, or let me call a tool."]),
    (["How big are you?", "How many parameters do you have?", "Are you a large model?"], ["I am very small: about 13 million parameters.", "I am a small model with about 13 million parameters."]),
    (["How are you?", "How are you today?", "How do you feel?"], ["I am fine, thank you. How can I help you?", "Thank you for asking. What can I do for you?"]),
    (["Hello!", "Hi!", "Hello there.", "Good morning!", "Hey!", "Good evening."], ["Hello! How can I help you today?", "Hi! What would you like to know?", "Hello! What can I do for you?"]),
    (["Thank you!", "Thanks a lot.", "Thank you very much."], ["You are welcome!", "You are welcome. I am happy to help."]),
    (["Goodbye!", "Bye!", "See you later."], ["Goodbye! Have a nice day.", "Bye! See you next time."]),
    (["Do you know everything?", "Are you always right?", "Can I trust you?"], ["No. I am a small model and I make mistakes. Please check what matters.", "No, I can be wrong. Check important facts."]),
]


def self_document(r):
    text = ""
    for asks, says in r.sample(SELF, r.randint(1, 3)):
        text += turn("user", r.choice(asks)) + turn("assistant", r.choice(says))
    return text


PROGRAMS = [("tool", tool_document, 50), ("robot", robot_document, 30), ("recall", recall_document, 17), ("self", self_document, 3)]


def document(seed, i):
    """Program-written document number `i`: (kind, text)."""
    r = random.Random(f"{seed}/program/{i}")
    kind, make = r.choices([(k, f) for k, f, _ in PROGRAMS], [w for _, _, w in PROGRAMS])[0]
    return kind, make(r)
