"""Seeded prompt templates: task number -> what the teacher is asked, and the document that is made of its answers.

`task(seed, i)` is a pure function, so that a shard needs to hold only the number and the sampled tokens.
"""

import random
import re
from dataclasses import dataclass
from typing import Callable

import words as W

BEGIN, END = "<|im_start|>", "<|im_end|>"
# Every conversation with the teacher begins so; the generator computes it once.
PREFIX = f"{BEGIN}system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face{END}\n{BEGIN}user\n"
TURN = f"{END}\n{BEGIN}assistant\n"
# After a sampled answer, which ends with the end token.
AGAIN = f"\n{BEGIN}user\n"


@dataclass
class Task:
    kind: str
    """Texts are given to the teacher; a number is an answer of at most so many tokens."""
    script: list
    """From the answers, in order, to a document; None to drop it."""
    build: Callable


def turn(role, text):
    return f"{BEGIN}{role}\n{text}{END}\n"


def chat(*turns):
    return "".join(turn(role, text) for role, text in turns)


def fill(text, r):
    """Puts words for the upper-case names in a template."""
    lists = {"NAME": W.NAMES, "ANIMAL": W.ANIMALS, "PERSON": W.PEOPLE, "TRAIT": W.TRAITS, "PLACE": W.PLACES,
             "OBJECT": W.OBJECTS, "FEELING": W.FEELINGS, "TOPIC": W.TOPICS, "DAY": W.DAYS, "CITY": W.CITIES}
    text = re.sub(r"[A-Z]{3,}", lambda m: r.choice(lists[m[0]]) if m[0] in lists else m[0], text)
    return re.sub(r"\b([Aa]) ([aeio]|um)", r"\1n \2", text)


STORY_ASKS = [
    "Write a short story about {hero} who {plot}.", "Tell me a story about {hero} who {plot}.",
    "Can you tell me a short story about {hero} who {plot}?", "Please write a little story. {Hero} {plot}.",
    "I would like a bedtime story about {hero} who {plot}.", "Make up a story in which {hero} {plot}.",
    "Tell a story about {hero} in a PLACE.", "Write a story about {hero} and a OBJECT.",
    "Write a short story about FEELING. {Hero} should be in it.", "Write a story about {hero} and {hero2}.",
    "Tell me a story about {name}, a {trait} {who}, who {plot}.", "Write a story for children about FEELING.",
    "Tell me a short tale about a {who} and a OBJECT in the PLACE.", "Write a short story with a happy end about {hero}.",
    "Write a funny story about {hero} who {plot}.", "Write a story about a TRAIT PERSON called {name}.",
]
STORY_LIMITS = ["", " Use simple words.", " Use short sentences and simple words.", " Keep it short.", " Write it for a small child.", " Use about 120 words."]
OPENINGS = [
    "Once upon a time, in a small {place}, there lived a {trait} {who} named {name}.", "One day, {name} found a {object} in the {place}.",
    "{name} was a {trait} {who} who lived near a {place}.", "It was a cold morning in the {place}, and {name} was {trait}.",
    "There was once a {trait} {who} who had a {object}.", "Long ago, a {trait} {who} lived in a {place}.",
    "\"Look at this {object}!\" said {name}.", "Every evening, {name} walked to the {place}.",
]

ASK = [
    ("What {is} {topic}?", "about"), ("What are some facts about {topic}?", "about"), ("Tell me about {topic}.", "about"),
    ("Tell me something interesting about {topic}.", "about"), ("Why {is} {topic} important?", "about"),
    ("Explain {topic} in simple words.", "about"), ("Explain {topic} to a child.", "about"), ("What do you know about {topic}?", "about"),
    ("Can you explain {topic} to me?", "about"), ("How would you describe {topic}?", "about"), ("What do people like about {topic}?", "about"),
    ("What is a good way to learn about {topic}?", "about"), ("What should I know about {topic}?", "about"),
    ("How do I {task}?", "task"), ("How can I {task}?", "task"), ("What is the best way to {task}?", "task"),
    ("Can you help me to {task}?", "task"), ("I want to {task}. What should I do?", "task"), ("Give me some tips to {task}.", "task"),
    ("Explain how to {task}.", "task"), ("My friend wants to {task}. What do you suggest?", "task"),
    ("Why {why}?", "why"), ("I wonder: why {why}?", "why"), ("What is the difference between {pair}?", "pair"),
]
ASK_LIMITS = [" Answer in three sentences.", " Answer in a few short sentences.", " Keep the answer short.", " Answer in two sentences.",
              " Use simple words and be brief.", " Answer in one short paragraph."]

DO = [
    ("Write {write}.", 150), ("Please write {write}.", 150), ("Can you write {write}?", 150), ("I need {write}.", 150),
    ("List {n} {list}.", 110), ("Give me {n} {list}.", 110), ("Name {n} {list}.", 110), ("What are some {list}?", 110),
    ("Can you think of {n} {list}?", 110), ("Give me a one sentence summary of {topic}.", 50), ("Write one sentence about {topic}.", 50),
    ("Use the words {object} and {animal} in a sentence.", 50), ("Describe {hero} in two sentences.", 70),
    ("Describe a {object} in a PLACE.", 80), ("Finish this sentence: \"{opening}\"", 70), ("Make a plan to {task}.", 130),
    ("What would {hero} say to {hero2}?", 90), ("Give me advice about {topic}.", 110), ("Ask me three questions about {topic}.", 80),
]

FOLLOW = [
    ("Can you tell me more about that?", 90), ("Why is that?", 80), ("Can you give me an example?", 80), ("Thank you! Can you say it in one sentence?", 50),
    ("That is interesting. What else should I know?", 90), ("What do you think is the most important part?", 70), ("Is that always true?", 70),
    ("Can you explain it to a child?", 80), ("And what about {topic}?", 90), ("How do I {task}?", 90), ("Thanks! Now tell me about {topic}.", 90),
    ("I did not understand. Can you use simpler words?", 80), ("What can I do with this?", 80), ("Can you give me three tips?", 100),
    ("Please write a short poem about it.", 80), ("What would a {who} say about that?", 70), ("Give me a title for that.", 25),
    ("Thank you!", 35), ("How did you feel about it?", 50), ("Who could help me with that?", 70),
]

SYSTEMS = ["You are a helpful assistant.", "You are Ampoule, a small and friendly assistant.", "You answer in plain English.",
           "You are a helpful assistant. Keep your answers short.", "You are a patient teacher.", "You are a storyteller."]


# Topics that end in s and are not many.
SINGULAR = {"chess", "mathematics", "Mars", "stress", "happiness", "sadness", "kindness", "photosynthesis", "glass", "grass", "Paris",
            "tennis", "the Milky Way"}


def hero(r):
    who = r.choice(r.choice([W.ANIMALS, W.PEOPLE]))
    form = r.random()
    if form < 0.5:
        return fill(f"a {r.choice(W.TRAITS)} {who}", r)
    if form < 0.75:
        return fill(f"a {who} named {r.choice(W.NAMES)}", r)
    return fill(f"a {who}", r)


def values(r):
    why = r.choice(W.WHYS)
    h = hero(r)
    v = {
        "hero": h, "hero2": hero(r), "plot": fill(r.choice(W.PLOTS), r), "name": r.choice(W.NAMES), "trait": r.choice(W.TRAITS),
        "who": r.choice(r.choice([W.ANIMALS, W.PEOPLE])), "place": r.choice(W.PLACES), "object": r.choice(W.OBJECTS),
        "animal": r.choice(W.ANIMALS), "topic": r.choice(W.TOPICS), "task": r.choice(W.TASKS), "why": why,
        "pair": r.choice(W.THINGS), "list": r.choice(W.LISTS), "n": r.choice(["three", "four", "five", "3", "5", "some"]),
        "write": fill(r.choice(W.WRITES), r),
    }
    v["is"] = "are" if v["topic"].endswith("s") and v["topic"] not in SINGULAR else "is"
    v["Hero"] = h[0].upper() + h[1:]
    v["opening"] = r.choice(OPENINGS).format(**v)
    return v


def phrase(template, r, v=None):
    return fill(template.format(**(v or values(r))), r)


def with_system(r, share=0.12):
    return turn("system", r.choice(SYSTEMS)) if r.random() < share else ""


def story(r):
    if r.random() < 0.3:  # plain text, no conversation
        opening = phrase(r.choice(OPENINGS), r)
        ask = "Write a short story in simple words. Start with this sentence: " + opening

        def build(answers):
            text = answers[0].strip()
            return text if len(text) > 200 else None

        return Task("text", [ask + r.choice(STORY_LIMITS) + TURN, 240], build)
    v = values(r)
    ask = phrase(r.choice(STORY_ASKS), r, v)
    limit = r.choice(STORY_LIMITS)
    shown = ask + (limit if r.random() < 0.25 else "")
    system = with_system(r)
    return Task("story", [ask + limit + TURN, 240], lambda a: system + chat(("user", shown), ("assistant", a[0].strip())))


def question(r):
    template, kind = r.choice(ASK) if r.random() < 0.8 else r.choice(ASK[-3:])
    ask = phrase(template, r)
    limit = r.choice(ASK_LIMITS)
    shown = ask + (limit if r.random() < 0.15 else "")
    if r.random() < 0.05:
        shown = shown[0].lower() + shown[1:].rstrip("?.")
    system = with_system(r)
    return Task("answer", [ask + limit + TURN, 150], lambda a: system + chat(("user", shown), ("assistant", a[0].strip())))


def instruction(r):
    template, budget = r.choice(DO)
    ask = phrase(template, r)
    limit = r.choice(["", " Keep it short.", " Use simple words."])
    system = with_system(r)
    return Task("instruction", [ask + limit + TURN, budget], lambda a: system + chat(("user", ask), ("assistant", a[0].strip())))


def conversation(r):
    template, _ = r.choice(ASK[:21])
    first = phrase(template, r)
    script = [first + r.choice(ASK_LIMITS) + TURN, 90]
    asks = [first]
    for _ in range(r.choice([1, 1, 2])):
        template, budget = r.choice(FOLLOW)
        ask = phrase(template, r)
        asks.append(ask)
        script += [AGAIN + ask + " Keep it short." + TURN, min(budget, 70)]
    system = with_system(r, 0.25)

    def build(answers):
        turns = []
        for ask, answer in zip(asks, answers):
            turns += [("user", ask), ("assistant", answer.strip())]
        return system + chat(*turns)

    return Task("chat", script, build)


def search(r):
    """A search call whose result is the teacher's text, and an answer that is taken from it."""
    import programs

    topic = r.choice(W.TOPICS)
    ask = f"Write three short facts about {topic}. One sentence for each."

    def build(answers):
        return programs.search(r, topic, answers[0])

    return Task("tool", [ask + TURN, 110], build)


KINDS = [(story, 34), (question, 27), (instruction, 17), (conversation, 14), (search, 8)]


def task(seed, i):
    r = random.Random(f"{seed}/{i}")
    kind = r.choices([k for k, _ in KINDS], [w for _, w in KINDS])[0]
    return kind(r)
