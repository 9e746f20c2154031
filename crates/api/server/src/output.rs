//! From the text of a reply to what a client gets: thoughts, content, calls of tools.

use serde_json::{Map, Value};

const THINK_OPEN: &str = "<think>";
const THINK_CLOSE: &str = "</think>";
const CALL_OPEN: &str = "<tool_call>";
const CALL_CLOSE: &str = "</tool_call>";

/// A piece for the client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Piece {
    Thought(String),
    Content(String),
    /// A whole call: half of one is worth nothing to anybody.
    Call {
        name: String,
        arguments: String,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Before the first visible character.
    Start,
    Thought,
    Content,
    Call,
}

/// Takes a reply apart as it comes.
#[derive(Clone, Debug)]
pub(crate) struct Splitter {
    state: State,
    held: String,
    thoughts: bool,
    calls: bool,
    /// Whether white space is dropped until something else comes: it stands between tags and text.
    skip: bool,
    /// Calls seen so far.
    pub called: usize,
}

impl Splitter {
    /// `thoughts`: whether the model thinks in tags; `thinking`: whether the prompt has opened one already; `calls`:
    /// whether there are tools.
    pub(crate) fn new(thoughts: bool, thinking: bool, calls: bool) -> Self {
        let state = if thinking { State::Thought } else { State::Start };
        Self { state, held: String::new(), thoughts, calls, skip: thinking, called: 0 }
    }

    /// Whether the reply is inside its thoughts.
    pub(crate) fn in_thoughts(&self) -> bool {
        self.state == State::Thought
    }

    /// Takes text; gives what is certain by now.
    pub(crate) fn push(&mut self, text: &str) -> Vec<Piece> {
        self.held.push_str(text);
        let mut out = Vec::new();
        while self.advance(&mut out) {}
        out
    }

    /// Ends the reply. A call that is not whole is dropped.
    pub(crate) fn finish(&mut self) -> Vec<Piece> {
        let rest = std::mem::take(&mut self.held);
        let piece = match self.state {
            State::Thought => Piece::Thought(rest.trim_end().to_owned()),
            State::Start | State::Content => Piece::Content(rest),
            State::Call => match parse(&rest) {
                Some(call) => {
                    self.called += 1;
                    call
                }
                None => return Vec::new(),
            },
        };
        let empty = matches!(&piece, Piece::Thought(t) | Piece::Content(t) if t.is_empty());
        if empty { Vec::new() } else { vec![piece] }
    }

    /// One step; false if more text is needed.
    fn advance(&mut self, out: &mut Vec<Piece>) -> bool {
        if self.skip {
            let kept = self.held.trim_start().len();
            self.held.drain(..self.held.len() - kept);
            self.skip = kept == 0;
        }
        match self.state {
            State::Start => {
                let trimmed = self.held.trim_start();
                if self.thoughts && trimmed.starts_with(THINK_OPEN) {
                    self.held = trimmed[THINK_OPEN.len()..].to_owned();
                    (self.state, self.skip) = (State::Thought, true);
                    return true;
                }
                if self.thoughts && THINK_OPEN.starts_with(trimmed) {
                    return false;
                }
                self.state = State::Content;
                true
            }
            State::Thought => {
                if let Some(at) = self.held.find(THINK_CLOSE) {
                    let thought = self.held[..at].trim_end().to_owned();
                    self.held = self.held[at + THINK_CLOSE.len()..].to_owned();
                    self.skip = true;
                    if !thought.is_empty() {
                        out.push(Piece::Thought(thought));
                    }
                    self.state = State::Content;
                    return true;
                }
                let keep = partial(&self.held, THINK_CLOSE);
                self.pass(keep, true, out);
                false
            }
            State::Content => {
                if !self.calls {
                    let keep = self.held.len();
                    self.pass(self.held.len() - keep, false, out);
                    return false;
                }
                if let Some(at) = self.held.find(CALL_OPEN) {
                    let before = self.held[..at].trim_end().to_owned();
                    self.held = self.held[at + CALL_OPEN.len()..].to_owned();
                    if !before.is_empty() {
                        out.push(Piece::Content(before));
                    }
                    self.state = State::Call;
                    return true;
                }
                let keep = partial(&self.held, CALL_OPEN);
                self.pass(keep, true, out);
                false
            }
            State::Call => {
                let Some(at) = self.held.find(CALL_CLOSE) else { return false };
                let inside = self.held[..at].to_owned();
                self.held = self.held[at + CALL_CLOSE.len()..].to_owned();
                match parse(&inside) {
                    Some(call) => {
                        self.called += 1;
                        out.push(call);
                    }
                    None => out.push(Piece::Content(format!("{CALL_OPEN}{inside}{CALL_CLOSE}"))),
                }
                (self.state, self.skip) = (State::Content, true);
                true
            }
        }
    }

    /// Lets all pass but the last `keep` bytes and, where asked, white space before them: a tag may follow.
    fn pass(&mut self, keep: usize, hold_space: bool, out: &mut Vec<Piece>) {
        let sure = &self.held[..self.held.len() - keep];
        let sure = if hold_space { sure.trim_end().len() } else { sure.len() };
        let rest = self.held.split_off(sure);
        let text = std::mem::replace(&mut self.held, rest);
        if !text.is_empty() {
            out.push(match self.state {
                State::Thought => Piece::Thought(text),
                _ => Piece::Content(text),
            });
        }
    }
}

/// Bytes at the end of `text` that may be the beginning of `tag`.
fn partial(text: &str, tag: &str) -> usize {
    (1..tag.len()).rev().find(|&n| text.ends_with(&tag[..n])).unwrap_or(0)
}

/// A call, as JSON or in XML.
fn parse(inside: &str) -> Option<Piece> {
    let inside = inside.trim();
    if let Ok(Value::Object(call)) = serde_json::from_str::<Value>(inside) {
        let name = call.get("name")?.as_str()?.to_owned();
        let arguments = match call.get("arguments").or_else(|| call.get("parameters")) {
            Some(Value::String(text)) => text.clone(),
            Some(value) => value.to_string(),
            None => "{}".to_owned(),
        };
        return Some(Piece::Call { name, arguments });
    }
    let rest = inside.strip_prefix("<function=")?;
    let (name, mut rest) = rest.split_once('>')?;
    let mut arguments = Map::new();
    while let Some((_, after)) = rest.split_once("<parameter=") {
        let (key, after) = after.split_once('>')?;
        let (value, after) = after.split_once("</parameter>")?;
        let value = value.strip_prefix('\n').unwrap_or(value);
        let value = value.strip_suffix('\n').unwrap_or(value);
        let parsed =
            serde_json::from_str(value).unwrap_or_else(|_| Value::String(value.to_owned()));
        arguments.insert(key.trim().to_owned(), parsed);
        rest = after;
    }
    let name = name.trim().to_owned();
    Some(Piece::Call { name, arguments: Value::Object(arguments).to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// However a text is divided the pieces say the same, and no tag is ever seen in part.
    fn all(text: &str, thinking: bool) -> (String, String, Vec<(String, String)>) {
        let mut expected = None;
        for size in 1..=text.len() {
            let mut splitter = Splitter::new(true, thinking, true);
            let mut pieces = Vec::new();
            let mut rest = text;
            while !rest.is_empty() {
                let mut n = size.min(rest.len());
                while !rest.is_char_boundary(n) {
                    n += 1;
                }
                pieces.extend(splitter.push(&rest[..n]));
                rest = &rest[n..];
            }
            pieces.extend(splitter.finish());
            let (mut thought, mut content, mut calls) = (String::new(), String::new(), Vec::new());
            for piece in pieces {
                match piece {
                    Piece::Thought(text) => thought.push_str(&text),
                    Piece::Content(text) => content.push_str(&text),
                    Piece::Call { name, arguments } => calls.push((name, arguments)),
                }
            }
            let found = (thought, content, calls);
            assert_eq!(*expected.get_or_insert_with(|| found.clone()), found, "pieces of {size}");
        }
        expected.unwrap_or_default()
    }

    #[test]
    fn thoughts_content_and_calls_come_apart() {
        let (thought, content, calls) = all(
            "<think>\nHm < é\n</think>\n\nIt <tool is.\n<tool_call>\n{\"name\": \"a\", \"arguments\": {\"x\": 1}}\n</tool_call>\n<tool_call>\n{\"name\": \"b\"}\n</tool_call>",
            false,
        );
        assert_eq!(thought.trim(), "Hm < é");
        assert_eq!(content, "It <tool is.");
        assert_eq!(calls, [("a".into(), "{\"x\":1}".into()), ("b".into(), "{}".into())]);
        let (thought, content, _) = all("so\n</think>\n\nYes.", true);
        assert_eq!((thought.as_str(), content.as_str()), ("so", "Yes."));
        let (thought, content, calls) = all("plain text", false);
        assert_eq!((thought.as_str(), content.as_str(), calls.len()), ("", "plain text", 0));
    }

    #[test]
    fn xml_calls_bad_calls_and_half_calls() {
        let xml = "<tool_call>\n<function=look>\n<parameter=at>\n3\n</parameter>\n<parameter=who>\nAnn B\n</parameter>\n</function>\n</tool_call>";
        let (_, content, calls) = all(xml, false);
        assert_eq!(calls, [("look".into(), "{\"at\":3,\"who\":\"Ann B\"}".into())]);
        assert_eq!(content, "");
        let (_, content, calls) = all("<tool_call>nonsense</tool_call>", false);
        assert_eq!((content.as_str(), calls.len()), ("<tool_call>nonsense</tool_call>", 0));
        let (_, content, calls) = all("Go <tool_call>\n{\"name\": \"a\", \"argu", false);
        assert_eq!((content.as_str(), calls.len()), ("Go", 0));
    }
}
