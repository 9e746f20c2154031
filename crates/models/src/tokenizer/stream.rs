//! Text as it is generated: whole characters, and stop strings that span tokens.

/// Turns bytes that arrive in pieces into text, holding back at most three bytes of an unfinished character.
///
/// All text that comes out, [`finish`](Self::finish) included, equals `String::from_utf8_lossy` of all bytes,
/// however they were divided. No text comes out twice and none is taken back.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StreamDecoder {
    pending: Vec<u8>,
}

impl StreamDecoder {
    /// A decoder that has seen nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the bytes of the next token and returns the text that is whole by now.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        self.pending.extend_from_slice(bytes);
        let mut text = String::with_capacity(self.pending.len());
        let mut rest = self.pending.as_slice();
        loop {
            match std::str::from_utf8(rest) {
                Ok(whole) => {
                    text.push_str(whole);
                    rest = &[];
                }
                Err(error) => {
                    let (whole, tail) = rest.split_at(error.valid_up_to());
                    text.push_str(&String::from_utf8_lossy(whole));
                    rest = tail;
                    if let Some(invalid) = error.error_len() {
                        text.push(char::REPLACEMENT_CHARACTER);
                        rest = rest.get(invalid..).unwrap_or_default();
                        continue;
                    }
                }
            }
            break;
        }
        let held = rest.len();
        self.pending.drain(..self.pending.len() - held);
        text
    }

    /// The bytes held back: the start of a character, three bytes at most.
    pub fn pending(&self) -> &[u8] {
        &self.pending
    }

    /// Ends the stream: what is held back becomes one U+FFFD. The decoder is new again.
    pub fn finish(&mut self) -> String {
        let text = String::from_utf8_lossy(&self.pending).into_owned();
        self.pending.clear();
        text
    }
}

/// What a [`StopMatcher`] lets through.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Passed {
    /// Text that is certain not to belong to a stop string.
    pub text: String,
    /// The stop string that was found, as an index into the list given to [`StopMatcher::new`]. From then on
    /// nothing passes.
    pub stopped: Option<usize>,
}

/// Finds stop strings in text that arrives in pieces.
///
/// The text ends before the stop string whose *last* byte comes first; among those that end there, before the
/// longest. So the result does not depend on how the text was divided. The longest end of the text that could
/// be the beginning of a stop string is held back until it is known.
#[derive(Clone, Debug)]
pub struct StopMatcher {
    patterns: Vec<Pattern>,
    held: String,
    stopped: Option<usize>,
}

/// One stop string with its matching state (Knuth, Morris and Pratt, "Fast pattern matching in strings", 1977).
#[derive(Clone, Debug)]
struct Pattern {
    index: usize,
    bytes: Vec<u8>,
    /// For each length matched, the longest shorter prefix that is also an end of it.
    fallback: Vec<usize>,
    /// Bytes of the pattern that the text ends with.
    matched: usize,
}

impl Pattern {
    fn new(index: usize, text: &str) -> Self {
        let bytes = text.as_bytes().to_vec();
        let mut fallback = vec![0; bytes.len() + 1];
        let mut length = 0;
        for at in 1..bytes.len() {
            while length > 0 && bytes[at] != bytes[length] {
                length = fallback[length];
            }
            if bytes[at] == bytes[length] {
                length += 1;
            }
            fallback[at + 1] = length;
        }
        Self { index, bytes, fallback, matched: 0 }
    }

    /// Takes one byte; true when the whole pattern has been seen.
    fn step(&mut self, byte: u8) -> bool {
        while self.matched > 0 && self.bytes.get(self.matched) != Some(&byte) {
            self.matched = self.fallback[self.matched];
        }
        if self.bytes.get(self.matched) == Some(&byte) {
            self.matched += 1;
        }
        self.matched == self.bytes.len()
    }
}

impl StopMatcher {
    /// A matcher for these strings. Empty ones are never found.
    pub fn new<S: AsRef<str>>(stops: impl IntoIterator<Item = S>) -> Self {
        let patterns = stops
            .into_iter()
            .enumerate()
            .filter(|(_, stop)| !stop.as_ref().is_empty())
            .map(|(index, stop)| Pattern::new(index, stop.as_ref()))
            .collect();
        Self { patterns, held: String::new(), stopped: None }
    }

    /// Takes the next piece of text and returns what is certain.
    pub fn push(&mut self, text: &str) -> Passed {
        if self.stopped.is_some() {
            return Passed { text: String::new(), stopped: self.stopped };
        }
        let before = self.held.len();
        self.held.push_str(text);
        for (at, byte) in text.bytes().enumerate() {
            let mut found: Option<(usize, usize)> = None;
            for pattern in &mut self.patterns {
                if pattern.step(byte)
                    && found.is_none_or(|(length, _)| pattern.bytes.len() > length)
                {
                    found = Some((pattern.bytes.len(), pattern.index));
                }
            }
            if let Some((length, index)) = found {
                self.stopped = Some(index);
                let mut text = std::mem::take(&mut self.held);
                // The stop string ends with this byte and lies within the text held, so its start is a boundary.
                text.truncate((before + at + 1).saturating_sub(length));
                return Passed { text, stopped: self.stopped };
            }
        }
        let keep = self.patterns.iter().map(|pattern| pattern.matched).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len().saturating_sub(keep));
        Passed { text: std::mem::replace(&mut self.held, rest), stopped: None }
    }

    /// Text held back because it could be the beginning of a stop string.
    pub fn held(&self) -> &str {
        &self.held
    }

    /// The stop string found, if one was.
    pub const fn stopped(&self) -> Option<usize> {
        self.stopped
    }

    /// Ends the stream: returns the text held back, which was no stop string after all. The matcher is new again.
    pub fn finish(&mut self) -> String {
        for pattern in &mut self.patterns {
            pattern.matched = 0;
        }
        self.stopped = None;
        std::mem::take(&mut self.held)
    }
}
