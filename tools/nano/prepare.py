"""Makes the training data of the raw text: documents, filtered and deduplicated, a tokenizer, and token files.

Writes to the folder:
  tokenizer.json   byte-level BPE, trained on part of the training split
  train.bin        uint16 tokens of the training split, documents in a shuffled order, each ended by <|endoftext|>
  train.idx        uint64 starts of the documents in train.bin, and its length
  heldout.bin/.idx the same for the held-out split
  train.sample.jsonl, heldout.jsonl, stats.json
A document goes to the held-out split by the hash of its task number, before anything is seen of its text.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import re
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np

import programs
import prompts

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TAGS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<tools>", "</tools>"]
PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
BOILERPLATE = re.compile(
    r"\b(as an? (helpful |friendly )?(ai|artificial|language model|digital)|i('m| am) (just )?(an?|your) (\w+ )?(ai|artificial|language model|chatbot|virtual)|"
    r"smollm|hugging ?face|openai|chatgpt|i('m| am) sorry|i apologi[sz]e|i cannot (provide|assist|help)|i can't (provide|assist|help)|i('m| am) (unable|not able) to|"
    r"i('m| am) (designed|programmed|trained|here to (help|assist|provide))|my (training|programming)|as of my|"
    r"don't have (the )?(access|capability|ability)|user('s)? (request|input|query|question)|the (prompt|user|assistant)|prompt|http|www\.|\[[a-z ]+\]|"
    r"(in |use |using )?simple words|be brief|in this context, the answer|metaphorical|(here's|this is|following is) (just )?an? (sample|example of)|"
    r"the answer (to (this|the) question )?is:)", re.I)
ALLOWED = re.compile(r"^[ -~\n]*$")


def tidy(text, complete):
    """The answer trimmed; a cut one ends with its last whole sentence. None if nothing good is left."""
    text = re.sub(r"[ \t]+\n", "\n", text.strip())
    text = re.sub(r"\n{3,}", "\n\n", text)
    if not complete:
        ends = [m.end() for m in re.finditer(r"[.!?][\"')]?(?=\s|$)", text)]
        if not ends:
            return None
        text = text[: ends[-1]]
        text = re.sub(r"\n\s*(\d+|[-*])[.)]?\s*$", "", text).rstrip()
    if text.startswith('"') and text.endswith('"') and text.count('"') == 2:
        text = text[1:-1]
    return text or None


def good(text):
    """Why an answer is dropped, or None."""
    if not ALLOWED.match(text):
        return "characters"
    if BOILERPLATE.search(text):
        return "boilerplate"
    words = re.findall(r"[A-Za-z']+", text.lower())
    if len(words) < 4:
        return "short"
    if sum(map(len, words)) < 0.6 * len(text):
        return "symbols"
    if len(words) >= 12:
        grams = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
        if len(set(grams)) < 0.85 * len(grams):
            return "repetition"
        if len(words) >= 40 and len(set(words)) < 0.35 * len(words):
            return "repetition"
        lines = [line for line in re.split(r"\n+|(?<=[.!?])\s+", text) if len(line) > 20]
        if len(set(lines)) < len(lines):
            return "repetition"
    if len(text) > 200 and len(zlib.compress(text.encode())) < 0.38 * len(text):
        return "repetition"
    if max(map(len, words)) > 22:
        return "symbols"
    return None


def shingles(text):
    """The eight smallest hashes of runs of five words: near-duplicates share most of them."""
    words = re.findall(r"[a-z']+", text.lower())
    hashes = [int.from_bytes(hashlib.blake2b(" ".join(words[i : i + 5]).encode(), digest_size=8).digest(), "little") for i in range(max(1, len(words) - 4))]
    hashes = np.unique(np.array(hashes, np.uint64))
    return np.sort(hashes)[:8]


TOKENIZER = None


def start(path):
    global TOKENIZER
    import generate

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    TOKENIZER = generate.tokenizer_of(path)


def held_out(key, share):
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") < share * 2**64


def taught(job):
    """Documents of a part of a raw shard: (kept, reasons why others were dropped)."""
    path, first, last, seed, share = job
    raw = np.load(path)
    tasks, rows, lengths = (raw[k] for k in ("task", "tokens", "length"))
    out, dropped = [], Counter()
    flag = 1 << 20
    for number, row, n in zip(tasks[first:last], rows[first:last], lengths[first:last]):
        task = prompts.task(seed, int(number))
        # The forced tokens between answers are in the script already; a run of sampled ones is an answer.
        answers, run = [], []
        budgets = iter([p for p in task.script if isinstance(p, int)])
        for token in [*row[:n].tolist(), 0]:
            if token >= flag:
                run.append(token - flag)
            elif run:
                complete = run[-1] == 2
                text = TOKENIZER.decode(run[:-1] if complete else run, skip_special_tokens=False)
                answers.append(tidy(text, complete))
                run = []
        reason = None
        wanted = sum(1 for _ in budgets)
        if len(answers) != wanted or any(a is None for a in answers):
            reason = "empty"
        for answer in answers if reason is None else ():
            reason = reason or good(answer)
        text = task.build(answers) if reason is None else None
        if reason is None and len(set(answers)) < len(answers):
            reason = "repetition"
        if reason or text is None:
            dropped[reason or "unfit"] += 1
            continue
        out.append((task.kind, text, held_out(f"{seed}/{number}", share), shingles(" ".join(answers))))
    return out, dropped


def written(job):
    """Program-written documents."""
    seed, first, last, share = job
    out = []
    for i in range(first, last):
        kind, text = programs.document(seed, i)
        out.append((kind, text, held_out(f"{seed}/program/{i}", share), None))
    return out, Counter()


def tokenizer_of(texts, vocabulary):
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), "isolated", False), pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    trainer = trainers.BpeTrainer(vocab_size=vocabulary - len(SPECIAL) - len(TAGS), initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    # Behind the vocabulary, as in Qwen's tokenizers; the tags are visible text, the others are not.
    from tokenizers import AddedToken

    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in TAGS])
    return tokenizer


ENCODER = PATH = None


def start_encoder(path):
    global PATH
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    PATH = path


def encode(texts):
    global ENCODER
    if ENCODER is None:
        from tokenizers import Tokenizer

        ENCODER = Tokenizer.from_file(PATH)
    end = ENCODER.token_to_id("<|endoftext|>")
    ids = [e.ids + [end] for e in ENCODER.encode_batch(texts, add_special_tokens=False)]
    return np.array([t for i in ids for t in i], np.uint16), np.array([len(i) for i in ids], np.int64)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--heldout", type=float, default=0.01)
    parser.add_argument("--programs", type=float, default=0.12, help="share of program-written documents, by characters")
    parser.add_argument("--programs-least", type=float, default=0, help="at least so many characters of them")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--sample", type=int, default=60_000_000, help="characters that the tokenizer is trained on")
    parser.add_argument("--sample-mb", type=float, default=48, help="size of train.sample.txt")
    parser.add_argument("--began", type=float, default=0)
    args = parser.parse_args()
    began = args.began or time.time()

    def log(text):
        print(f"[{time.time() - began:6.1f}s] prepare: {text}", flush=True)

    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    jobs = []
    for path in sorted(Path(args.raw).glob("raw.*.*.npz")):
        if ".part." in path.name:
            continue
        try:
            count = len(np.load(path)["task"])
        except Exception as error:
            log(f"{path.name} cannot be read: {error!r}")
            continue
        jobs += [(str(path), a, min(a + 500, count), args.seed, args.heldout) for a in range(0, count, 500)]
    context = multiprocessing.get_context("fork")
    documents, dropped, near = [], Counter(), set()
    exact = set()
    with context.Pool(args.jobs, start, (args.teacher,)) as pool:
        for made, reasons in pool.imap(taught, jobs, chunksize=1):
            dropped += reasons
            for kind, text, held, shingle in made:
                key = hashlib.blake2b(text.encode(), digest_size=8).digest()
                marks = shingle.tolist()
                # Half of the smallest hashes are known: about half of the runs of five words are.
                if key in exact:
                    dropped["duplicate"] += 1
                elif sum(m in near for m in marks) * 2 >= len(marks):
                    dropped["near duplicate"] += 1
                else:
                    exact.add(key)
                    near.update(marks)
                    documents.append((kind, text, held))
        taught_characters = sum(len(d[1]) for d in documents)
        log(f"{len(documents):,} documents of the teacher, {taught_characters:,} characters; dropped {dict(dropped)}")
        wanted, have, number = max(args.programs_least, taught_characters * args.programs / (1 - args.programs)), 0, 0
        while have < wanted:
            batch = [(args.seed, number + i * 250, number + (i + 1) * 250, args.heldout) for i in range(args.jobs)]
            number += args.jobs * 250
            for made, _ in pool.imap(written, batch):
                for kind, text, held, _ in made:
                    key = hashlib.blake2b(text.encode(), digest_size=8).digest()
                    if key in exact or have >= wanted:
                        continue
                    exact.add(key)
                    documents.append((kind, text, held))
                    have += len(text)
    log(f"{have:,} characters by programs")
    order = np.random.default_rng(args.seed).permutation(len(documents))
    documents = [documents[i] for i in order]
    train = [d for d in documents if not d[2]]
    held = [d for d in documents if d[2]]
    # No long run of words of a held-out document is in the training split: near-duplicates went before the split.
    size, sample = 0, []
    for _, text, _ in train:
        sample.append(text)
        size += len(text)
        if size > args.sample:
            break
    # The encoders start before the library has threads in this process: forking later could lock them up.
    encoders = context.Pool(args.jobs, start_encoder, (str(out / "tokenizer.json"),))
    # The special texts are tokens of their own and must not become merges.
    cut = re.compile("|".join(re.escape(t) for t in SPECIAL + TAGS))
    tokenizer = tokenizer_of((part for text in sample for part in cut.split(text) if part), args.vocabulary)
    tokenizer.save(str(out / "tokenizer.json"))
    log(f"tokenizer of {tokenizer.get_vocab_size()} tokens trained on {size:,} characters")

    stats = {"kinds": {}, "dropped": dict(dropped), "seed": args.seed}
    with encoders as pool:
        for name, part in (("train", train), ("heldout", held)):
            texts = [d[1] for d in part]
            chunks = [texts[i : i + 400] for i in range(0, len(texts), 400)]
            ids, lengths = [], []
            for a, b in pool.imap(encode, chunks):
                ids.append(a)
                lengths.append(b)
            ids, lengths = np.concatenate(ids), np.concatenate(lengths)
            ids.tofile(out / f"{name}.bin")
            np.concatenate([[0], lengths.cumsum()]).astype(np.uint64).tofile(out / f"{name}.idx")
            kinds = {}
            for (kind, text, _), n in zip(part, lengths.tolist()):
                k = kinds.setdefault(kind, [0, 0, 0])
                k[0], k[1], k[2] = k[0] + 1, k[1] + len(text.encode()), k[2] + n
            stats[name] = {"documents": len(texts), "bytes": sum(k[1] for k in kinds.values()), "tokens": int(len(ids)),
                           "kinds": {k: dict(zip(("documents", "bytes", "tokens"), v)) for k, v in sorted(kinds.items())}}
            log(f"{name}: {len(texts):,} documents, {len(ids):,} tokens")
    (out / "stats.json").write_text(json.dumps(stats, indent=1))
    with open(out / "heldout.jsonl", "w") as file:
        for kind, text, _ in held:
            file.write(json.dumps({"kind": kind, "text": text}) + "\n")
    with open(out / "train.sample.jsonl", "w") as file:
        limit = args.sample_mb * 1e6
        for kind, text, _ in train:
            limit -= file.write(json.dumps({"kind": kind, "text": text}) + "\n")
            if limit < 0:
                break
    log("done")


if __name__ == "__main__":
    main()
