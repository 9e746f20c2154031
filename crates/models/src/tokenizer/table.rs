//! The bytes of every token.

/// How a token takes part in text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenKind {
    /// A piece of text.
    Normal,
    /// A control token such as `<|im_end|>`: found in text only where special tokens are parsed.
    Special,
    /// A token added by the model's makers that is found in all text, such as `<think>`.
    Added,
    /// The id stands for nothing: a gap in the vocabulary, or padding of it.
    Unused,
}

/// GPT-2's printable stand-in for a byte: printable Latin-1 stands for itself, the other 68 bytes, in
/// ascending order, for the characters from U+0100 on. Source: `bytes_to_unicode` of the GPT-2 release.
pub(super) const fn stand_in(byte: u8) -> u32 {
    const fn printable(byte: u8) -> bool {
        matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff)
    }
    if printable(byte) {
        return byte as u32;
    }
    let mut rank = 0;
    let mut other = 0;
    while other < byte {
        if !printable(other) {
            rank += 1;
        }
        other += 1;
    }
    0x100 + rank
}

/// The byte of each stand-in, which all lie below U+0144.
const BYTES: [Option<u8>; 0x144] = {
    let mut table = [None; 0x144];
    let mut byte = 0;
    while byte < 256 {
        table[stand_in(byte as u8) as usize] = Some(byte as u8);
        byte += 1;
    }
    table
};

fn byte_of(stand_in: char) -> Option<u8> {
    BYTES.get(stand_in as usize).copied().flatten()
}

/// Bytes and kinds of all tokens, by id.
#[derive(Clone, Debug, Default)]
pub(super) struct TokenTable {
    bytes: Vec<u8>,
    /// Where each token's bytes end.
    ends: Vec<usize>,
    kinds: Vec<TokenKind>,
}

impl TokenTable {
    pub(super) fn len(&self) -> usize {
        self.kinds.len()
    }

    /// Adds the next id. The text of a normal token is in stand-ins; one that has other characters means itself,
    /// as in the ByteLevel decoder of the `tokenizers` library.
    pub(super) fn push(&mut self, text: &str, kind: TokenKind) {
        match kind {
            TokenKind::Normal => {
                let start = self.bytes.len();
                if text.chars().all(|c| byte_of(c).is_some()) {
                    self.bytes.extend(text.chars().filter_map(byte_of));
                }
                if self.bytes.len() == start {
                    self.bytes.extend_from_slice(text.as_bytes());
                }
            }
            TokenKind::Special | TokenKind::Added => self.bytes.extend_from_slice(text.as_bytes()),
            TokenKind::Unused => {}
        }
        self.ends.push(self.bytes.len());
        self.kinds.push(kind);
    }

    pub(super) fn kind(&self, id: u32) -> TokenKind {
        self.kinds.get(id as usize).copied().unwrap_or(TokenKind::Unused)
    }

    /// The bytes of a token that stands for something.
    pub(super) fn bytes(&self, id: u32) -> Option<&[u8]> {
        if self.kind(id) == TokenKind::Unused {
            return None;
        }
        let id = id as usize;
        let start = id.checked_sub(1).map_or(Some(0), |before| self.ends.get(before).copied())?;
        self.bytes.get(start..*self.ends.get(id)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stand_ins_are_a_bijection_with_the_published_values() {
        for byte in 0..=255 {
            let c = char::from_u32(stand_in(byte)).unwrap();
            assert_eq!(byte_of(c), Some(byte));
        }
        // Published: space is U+0120, newline U+010A, the soft hyphen (0xad) comes last.
        assert_eq!((stand_in(b' '), stand_in(b'\n'), stand_in(0xad)), (0x120, 0x10a, 0x143));
        assert_eq!(byte_of('\u{ad}'), None);
    }

    #[test]
    fn bytes_of_each_kind() {
        let mut table = TokenTable::default();
        table.push("Ġé", TokenKind::Normal);
        table.push("é", TokenKind::Added);
        table.push("[PAD]", TokenKind::Unused);
        table.push("日", TokenKind::Normal);
        // U+00E9 stands for the lone byte e9 in a normal token, for itself in an added one.
        assert_eq!(table.bytes(0), Some(&b" \xe9"[..]));
        assert_eq!(table.bytes(1), Some("é".as_bytes()));
        assert_eq!(table.bytes(2), None);
        assert_eq!(table.bytes(3), Some("日".as_bytes()));
        assert_eq!(table.bytes(4), None);
    }
}
