"""Reads the parts of a GGUF file that the teacher needs: F32, Q8_0 and Q4_1 tensors, and the vocabulary."""

import struct

import numpy as np

NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
F32, Q4_1, Q8_0 = 0, 3, 8


class GgufFile:
    def __init__(self, path, partial=False):
        # Of a partial file, tensors that are not there are random: enough to time the generator.
        self.partial = partial
        self.data = np.memmap(path, np.uint8, "r")
        self.at = 4
        if bytes(self.data[:4]) != b"GGUF":
            raise SystemExit(f"{path} is not a GGUF file")
        self._number("<I")
        tensors, fields = self._number("<Q"), self._number("<Q")
        self.fields = {}
        for _ in range(fields):
            name = self._text()
            self.fields[name] = self._value(self._number("<I"))
        self.tensors = {}
        for _ in range(tensors):
            name = self._text()
            shape = [self._number("<Q") for _ in range(self._number("<I"))]
            self.tensors[name] = (self._number("<I"), shape[::-1], self._number("<Q"))
        unit = self.fields.get("general.alignment", 32)
        self.start = (self.at + unit - 1) // unit * unit

    def _number(self, form):
        size = struct.calcsize(form)
        value = struct.unpack(form, bytes(self.data[self.at : self.at + size]))[0]
        self.at += size
        return value

    def _text(self):
        size = self._number("<Q")
        self.at += size
        return bytes(self.data[self.at - size : self.at]).decode()

    def _value(self, kind):
        if kind == 8:
            return self._text()
        if kind == 9:
            inner, count = self._number("<I"), self._number("<Q")
            return [self._value(inner) for _ in range(count)]
        return self._number(NUMBERS[kind])

    def tensor(self, name):
        """The tensor in float32; matrices as [out, in]."""
        kind, shape, offset = self.tensors[name]
        count, begin = int(np.prod(shape)), self.start + offset
        if self.partial and begin + count * 4 > len(self.data):
            return np.random.default_rng(0).normal(0, 0.03, shape).astype(np.float32)

        def blocks(size):
            return np.array(self.data[begin : begin + count // 32 * size]).reshape(-1, size)

        def half(bytes_):
            return bytes_.copy().view(np.float16).astype(np.float32)

        if kind == F32:
            return np.array(self.data[begin : begin + 4 * count]).view(np.float32).reshape(shape)
        if kind == Q8_0:
            b = blocks(34)
            return (b[:, 2:].view(np.int8) * half(b[:, :2])).reshape(shape)
        if kind == Q4_1:
            b = blocks(20)
            q = np.concatenate([b[:, 4:] & 15, b[:, 4:] >> 4], axis=1).astype(np.float32)
            return (q * half(b[:, :2]) + half(b[:, 2:4])).reshape(shape)
        raise SystemExit(f"{name} has element type {kind}; the teacher needs F32, Q8_0 or Q4_1")


def tokenizer_json(file):
    """The file's vocabulary as a tokenizer of the `tokenizers` library."""
    tokens = file.fields["tokenizer.ggml.tokens"]
    kinds = file.fields["tokenizer.ggml.token_type"]
    special = [{"id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
               for i, (t, kind) in enumerate(zip(tokens, kinds)) if kind == 3]
    merges = [merge.split(" ") for merge in file.fields["tokenizer.ggml.merges"]]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, level]},
        "post_processor": None, "decoder": dict(level, add_prefix_space=True),
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": {t: i for i, t in enumerate(tokens)}, "merges": merges},
    }
